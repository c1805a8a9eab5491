"""What each way of fine-tuning costs: the paper's Table 7, measured again on this machine."""

from .paper import PAPER_MODEL, PAPER_ROWS, PaperRow
from .row import CostRow, SensitivitySpeed
from .setting import CostSetting
from .table7 import Table7, run_table7
from .ways import WAYS

__all__ = [
    "PAPER_MODEL",
    "PAPER_ROWS",
    "WAYS",
    "CostRow",
    "CostSetting",
    "PaperRow",
    "SensitivitySpeed",
    "Table7",
    "run_table7",
]
