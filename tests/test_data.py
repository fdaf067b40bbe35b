"""Fashion-MNIST: where it is looked for, what is refused, and how it is fetched."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import data, fetch
from launch.data import DIGITS, FILES, DataError, find_fashion_mnist, load_images, parse_idx
from launch.fetch import fetch_fashion_mnist


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_files(num_train: int = 7, num_test: int = 3) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    contents = {}
    for part, num in (("train", num_train), ("t10k", num_test)):
        contents[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (num, 28, 28)))
        contents[f"{part}-labels-idx1-ubyte"] = idx(rng.integers(0, 10, (num,)))
    return contents


def write_folder(folder: Path, contents: dict[str, bytes], packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in contents.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return folder


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the package, a cache, apt and a network."""
    monkeypatch.delenv("DISTSIGN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(fetch, "_may_install", lambda: False)
    monkeypatch.setattr(fetch, "PROJECT_URL", "https://127.0.0.1:9/")


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 100))
def test_idx_round_trip(shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    parsed = parse_idx(idx(array), "file")
    assert parsed.shape == array.shape
    assert np.array_equal(parsed, array)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-1], "truncated: expected 76 bytes for 3 x 4 x 5, got 75"),
        (lambda raw: raw + b"x", "too long: expected 76 bytes for 3 x 4 x 5, got 77"),
        (lambda raw: raw[:10], "expected an idx file of bytes"),
        (lambda raw: b"", "expected an idx file of bytes"),
        (lambda raw: b"\0\0\x0d" + raw[3:], "got 00 00 0d 03"),
        (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "truncated: expected"),
    ],
)
def test_damaged_idx_is_refused(damage, words) -> None:
    with pytest.raises(DataError, match=f"file: .*{words}.*again"):
        parse_idx(damage(idx(np.zeros((3, 4, 5)))), "file")


@pytest.mark.parametrize("packed", [True, False])
def test_files_are_read_packed_or_not(tmp_path: Path, packed: bool) -> None:
    contents = small_files()
    images = load_images(write_folder(tmp_path / "own", contents, packed))
    assert images.train_images.shape == (7, 28, 28)
    assert images.test_labels.shape == (3,)
    assert images.train_images.numpy().tobytes() == contents["train-images-idx3-ubyte"][16:]
    assert images.test_labels.tolist() == list(contents["t10k-labels-idx1-ubyte"][8:])
    assert str(tmp_path / "own") in images.source
    assert not images.source.startswith("Fashion-MNIST"), "made-up files must not pass for Fashion-MNIST"


def test_order_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_fashion_mnist() is None
    cache = write_folder(data.cache_folder(), small_files())
    assert find_fashion_mnist() == cache == tmp_path / "cache" / "distsign" / "fashion-mnist"
    debian = write_folder(tmp_path / "debian", small_files())
    assert find_fashion_mnist() == debian
    own = write_folder(tmp_path / "own", small_files())
    monkeypatch.setenv("DISTSIGN_DATA", str(own))
    assert find_fashion_mnist() == own
    named = write_folder(tmp_path / "named", small_files())
    assert find_fashion_mnist(str(named)) == named
    assert find_fashion_mnist(DIGITS) is None


@pytest.mark.parametrize("find", [find_fashion_mnist, fetch_fashion_mnist])
def test_named_folder_is_never_replaced_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, find) -> None:
    write_folder(tmp_path / "debian", small_files())
    monkeypatch.setenv("DISTSIGN_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="absent is no folder.*unset DISTSIGN_DATA"):
        find()
    contents = small_files()
    del contents["t10k-labels-idx1-ubyte"]
    monkeypatch.setenv("DISTSIGN_DATA", str(write_folder(tmp_path / "own", contents)))
    with pytest.raises(DataError, match="own lacks t10k-labels-idx1-ubyte"):
        find()


@pytest.mark.parametrize("name", FILES)
def test_truncated_gzip_names_the_file(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, small_files())
    path = folder / f"{name}.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"{name}\.gz: expected a whole gzip file, got \d+ bytes.*again"):
        load_images(folder)


def test_damaged_gzip_names_the_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, small_files())
    path = folder / "train-images-idx3-ubyte.gz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: expected a whole gzip file"):
        load_images(folder)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    contents = small_files() | {"train-labels-idx1-ubyte": idx(np.zeros(8))}
    with pytest.raises(DataError, match="train files do not belong together.*28, 28.*8"):
        load_images(write_folder(tmp_path / "a", contents))
    contents = small_files() | {"t10k-labels-idx1-ubyte": idx(np.array([1, 2, 10]))}
    with pytest.raises(DataError, match="t10k labels go up to 10"):
        load_images(write_folder(tmp_path / "b", contents))


def test_digits_stand_in() -> None:
    images = load_images(None)
    assert images.train_images.shape == (1437, 28, 28)
    assert images.test_images.shape == (360, 28, 28)
    assert images.train_images.max() == 255
    assert images.train_images[:, :2].max() == 0
    assert set(images.test_labels.tolist()) == set(range(10))
    assert "digits" in images.source


def test_without_a_network_it_gives_up_soon() -> None:
    said: list[str] = []
    began = time.monotonic()
    assert fetch_fashion_mnist(say=said.append) is None
    assert time.monotonic() - began < fetch.CONNECT_TIMEOUT_S + 2
    assert "cannot be reached" in said[-1]
    assert not data.cache_folder().exists()


class _Files(http.server.BaseHTTPRequestHandler):
    contents: dict[str, bytes] = {}
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        raw = self.contents.get(self.path)
        self.send_response(404 if raw is None else 200)
        self.end_headers()
        self.wfile.write(raw or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Small files behind a URL on this machine, with their right checksums."""
    files = small_files()
    _Files.contents = {f"/{name}.gz": gzip.compress(raw) for name, raw in files.items()}
    _Files.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setattr(fetch, "PROJECT_URL", f"http://127.0.0.1:{httpd.server_port}/")
        monkeypatch.setattr(data, "SHA256", {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()})
        yield _Files.contents
        httpd.shutdown()
        thread.join()


def test_download_once(server: dict[str, bytes]) -> None:
    folder = fetch_fashion_mnist()
    assert folder == data.cache_folder()
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gz" for name in FILES)
    assert load_images(folder).source.startswith("Fashion-MNIST (downloaded")
    assert fetch_fashion_mnist() == folder
    assert len(_Files.asked) == len(FILES)


@pytest.mark.parametrize("damage", ["another content", "cut short", "absent"])
def test_bad_download_is_not_used(server: dict[str, bytes], damage: str) -> None:
    name = "/t10k-images-idx3-ubyte.gz"
    if damage == "another content":
        server[name] = gzip.compress(idx(np.ones((3, 28, 28))))
    elif damage == "cut short":
        server[name] = server[name][:-20]
    else:
        del server[name]
    said: list[str] = []
    assert fetch_fashion_mnist(say=said.append) is None
    assert "t10k-images-idx3-ubyte.gz" in said[-1]
    assert [path.name for path in data.cache_folder().iterdir() if "t10k-images" in path.name] == []
    assert find_fashion_mnist() is None


def test_debian_package_is_installed_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install() -> bool:
        write_folder(tmp_path / "debian", small_files())
        return True

    monkeypatch.setattr(fetch, "_may_install", lambda: True)
    monkeypatch.setattr(fetch, "_install_debian_package", install)
    assert fetch_fashion_mnist() == tmp_path / "debian"


def test_failing_apt_leads_to_the_download(server: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_may_install", lambda: True)
    monkeypatch.setattr(fetch, "_install_debian_package", lambda: False)
    assert fetch_fashion_mnist() == data.cache_folder()


def test_debians_files_are_the_published_ones() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    for name in FILES:
        raw = gzip.decompress((folder / f"{name}.gz").read_bytes())
        assert hashlib.sha256(raw).hexdigest() == data.SHA256[name]
