"""Studies: tasks x settings x schemes x seeds from one TOML file, run where results are missing, and reported.

`python -m distsign study FILE.toml` is the command; see `distsign.study.plan` for what a file says.
"""

from distsign.study.plan import Cell, Study
from distsign.study.reading import load_study, parse_study

__all__ = ["Cell", "Study", "load_study", "parse_study"]
