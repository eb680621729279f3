"""Every format of the room. No two recognize one checkpoint."""

from quantport.checkpoint import CheckpointFormat
from quantport_formats.auto_round import AutoRound
from quantport_formats.awq import Awq
from quantport_formats.bitsandbytes import Bitsandbytes
from quantport_formats.compressed_tensors import CompressedTensors
from quantport_formats.fp8 import Fp8
from quantport_formats.gguf import Gguf
from quantport_formats.gpt_oss import GptOss
from quantport_formats.gptq import Gptq
from quantport_formats.hqq import Hqq
from quantport_formats.modelopt import ModelOpt
from quantport_formats.msmodelslim import MsModelSlim
from quantport_formats.mxfp8 import Mxfp8
from quantport_formats.not_read import NotRead
from quantport_formats.pytorch import PyTorch
from quantport_formats.quanto import Quanto
from quantport_formats.quark import Quark
from quantport_formats.torchao import TorchAo

FORMATS: tuple[CheckpointFormat, ...] = (
    AutoRound(),
    Awq(),
    Bitsandbytes(),
    CompressedTensors(),
    Fp8(),
    Gguf(),
    GptOss(),
    Gptq(),
    Hqq(),
    ModelOpt(),
    MsModelSlim(),
    Mxfp8(),
    NotRead(),
    PyTorch(),
    Quanto(),
    Quark(),
    TorchAo(),
)
