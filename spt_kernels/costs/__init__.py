"""What each method of fine-tuning costs: the paper's Table 7, measured again on this machine."""

from .paper import PAPER_MODEL, PAPER_ROWS, PAPER_SAMPLES, PAPER_SENSITIVITY_S, PaperRow
from .row import CostRow
from .sensitivity_speed import SensitivitySpeed
from .setting import ROWS, CostSetting
from .table7 import Table7, run_table7

__all__ = [
    "PAPER_MODEL",
    "PAPER_ROWS",
    "PAPER_SAMPLES",
    "PAPER_SENSITIVITY_S",
    "ROWS",
    "CostRow",
    "CostSetting",
    "PaperRow",
    "SensitivitySpeed",
    "Table7",
    "run_table7",
]
