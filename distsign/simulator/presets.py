"""Well-known models by their real layer shapes, in the order in which their parameters are registered.

Each is generated from a short description of its architecture. With every parameter goes how often it is multiplied for
one sample (for one token, in transformers): that decides when its gradient is ready during backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

__all__ = ["PRESETS", "Parameter"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model.

    Args:
        name: as in `named_parameters()`.
        shape: its shape.
        uses: how often each of its elements is multiplied for one sample; only the ratio to other parameters counts.
    """

    name: str
    shape: tuple[int, ...]
    uses: float = 1.0

    @property
    def num_elements(self) -> int:
        """Its size."""
        return prod(self.shape)


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True, uses: float = 1.0) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (outputs, inputs), uses)
    if bias:
        yield Parameter(f"{name}.bias", (outputs,), uses)


def _norm(name: str, width: int, *, bias: bool = True, uses: float = 1.0) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (width,), uses)
    if bias:
        yield Parameter(f"{name}.bias", (width,), uses)


def _conv(name: str, inputs: int, outputs: int, kernel: int, side: int, *, bias: bool = False) -> Iterator[Parameter]:
    """Yield a convolution whose output is `side` x `side`."""
    yield Parameter(f"{name}.weight", (outputs, inputs, kernel, kernel), side**2)
    if bias:
        yield Parameter(f"{name}.bias", (outputs,), side**2)


def _lenet() -> Iterator[Parameter]:
    """LeNet-5 for images of 28 x 28, the model of the task fashion-mnist-lenet."""
    yield from _conv("conv1", 1, 6, 5, 28, bias=True)
    yield from _conv("conv2", 6, 16, 5, 10, bias=True)
    yield from _linear("fc1", 400, 120)
    yield from _linear("fc2", 120, 84)
    yield from _linear("fc3", 84, 10)


def _resnet(blocks: Sequence[int], *, bottleneck: bool) -> Iterator[Parameter]:
    """He et al., arXiv 1512.03385, as torchvision builds it: the stride lies in a bottleneck's 3 x 3 convolution."""
    expansion = 4 if bottleneck else 1
    yield from _conv("conv1", 3, 64, 7, 112)
    yield from _norm("bn1", 64, uses=112**2)
    inputs, before = 64, 56
    for stage, num_blocks in enumerate(blocks):
        width, side = 64 << stage, 56 >> stage
        outputs = width * expansion
        for block in range(num_blocks):
            name = f"layer{stage + 1}.{block}"
            kernels = (1, 3, 1) if bottleneck else (3, 3)
            channels = (inputs, width, width, outputs) if bottleneck else (inputs, width, outputs)
            for k, kernel in enumerate(kernels):
                at = before if bottleneck and k == 0 else side
                yield from _conv(f"{name}.conv{k + 1}", channels[k], channels[k + 1], kernel, at)
                yield from _norm(f"{name}.bn{k + 1}", channels[k + 1], uses=at**2)
            if inputs != outputs:
                yield from _conv(f"{name}.downsample.0", inputs, outputs, 1, side)
                yield from _norm(f"{name}.downsample.1", outputs, uses=side**2)
            inputs, before = outputs, side
    yield from _linear("fc", inputs, 1000)


def _vgg19() -> Iterator[Parameter]:
    """Simonyan and Zisserman, arXiv 1409.1556, without batch normalisation."""
    index, inputs = 0, 3
    for stage, (width, num_convs) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))):
        for _ in range(num_convs):
            yield from _conv(f"features.{index}", inputs, width, 3, 224 >> stage, bias=True)
            inputs, index = width, index + 2  # a ReLU follows each
        index += 1  # the pooling
    yield from _linear("classifier.0", 512 * 7 * 7, 4096)
    yield from _linear("classifier.3", 4096, 4096)
    yield from _linear("classifier.6", 4096, 1000)


def _bert_base() -> Iterator[Parameter]:
    """Devlin et al., arXiv 1810.04805: the encoder with its pooler, as in Hugging Face's BertModel."""
    width = 768
    for name, rows in (("word", 30522), ("position", 512), ("token_type", 2)):
        yield Parameter(f"embeddings.{name}_embeddings.weight", (rows, width), 0.0)
    yield from _norm("embeddings.LayerNorm", width)
    for layer in range(12):
        name = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            yield from _linear(f"{name}.attention.self.{part}", width, width)
        yield from _linear(f"{name}.attention.output.dense", width, width)
        yield from _norm(f"{name}.attention.output.LayerNorm", width)
        yield from _linear(f"{name}.intermediate.dense", width, 4 * width)
        yield from _linear(f"{name}.output.dense", 4 * width, width)
        yield from _norm(f"{name}.output.LayerNorm", width)
    yield from _linear("pooler.dense", width, width, uses=1 / 128)


def _gpt2_small() -> Iterator[Parameter]:
    """Radford et al. 2019, the smallest, its output tied to the embedding; Conv1D weights are (inputs, outputs)."""
    width = 768
    # Tied, so its gradient is complete only at the end of backward, by the embedding.
    yield Parameter("wte.weight", (50257, width), 1.0)
    yield Parameter("wpe.weight", (1024, width), 0.0)
    for layer in range(12):
        name = f"h.{layer}"
        yield from _norm(f"{name}.ln_1", width)
        yield from _conv1d(f"{name}.attn.c_attn", width, 3 * width)
        yield from _conv1d(f"{name}.attn.c_proj", width, width)
        yield from _norm(f"{name}.ln_2", width)
        yield from _conv1d(f"{name}.mlp.c_fc", width, 4 * width)
        yield from _conv1d(f"{name}.mlp.c_proj", 4 * width, width)
    yield from _norm("ln_f", width)


def _conv1d(name: str, inputs: int, outputs: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (inputs, outputs))
    yield Parameter(f"{name}.bias", (outputs,))


def _llama_7b() -> Iterator[Parameter]:
    """Touvron et al., arXiv 2302.13971, as in Hugging Face's LlamaForCausalLM."""
    width, hidden, words = 4096, 11008, 32000
    yield Parameter("model.embed_tokens.weight", (words, width), 0.0)
    for layer in range(32):
        name = f"model.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield from _linear(f"{name}.self_attn.{part}", width, width, bias=False)
        for part in ("gate_proj", "up_proj"):
            yield from _linear(f"{name}.mlp.{part}", width, hidden, bias=False)
        yield from _linear(f"{name}.mlp.down_proj", hidden, width, bias=False)
        yield from _norm(f"{name}.input_layernorm", width, bias=False)
        yield from _norm(f"{name}.post_attention_layernorm", width, bias=False)
    yield from _norm("model.norm", width, bias=False)
    yield from _linear("lm_head", width, words, bias=False)


PRESETS: dict[str, Callable[[], Iterator[Parameter]]] = {
    "lenet": _lenet,
    "resnet18": lambda: _resnet((2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda: _resnet((3, 4, 6, 3), bottleneck=True),
    "vgg19": _vgg19,
    "bert-base": _bert_base,
    "gpt2-small": _gpt2_small,
    "llama-7b": _llama_7b,
}
"""Models by name."""
