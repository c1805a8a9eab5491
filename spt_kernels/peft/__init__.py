"""SPT as a method of Hugging Face PEFT; importing this is what registers it there."""

from ..errors import needed

with needed("spt_kernels.peft", "peft"):
    import peft as _peft  # noqa: F401

from .config import SptConfig
from .imported import import_adapter
from .lora_folder import export_lora
from .model import SptModel
from .registration import register

__all__ = ["SptConfig", "SptModel", "export_lora", "import_adapter"]

register(SptConfig, SptModel)
