"""Int8 inference for PyTorch whose scales adapt to every input at the cost of fixed ones.

Implements "A probabilistic framework for dynamic quantization" (arXiv 2505.10689). `torch.ops.probquant` holds the ops;
`quantize` turns a float model into an int8 one; `compare` shows what that gains and costs.
"""

from . import _native_folder

_folder = _native_folder.find()
if str(_folder) not in __path__:
    __path__.append(str(_folder))

from ._native import build_info, cpu_info
from ._ops import Activation, Strategy, ops, ops_library
from .model import Capture, LayerInfo, QuantizedModel, load, save, validate
from .quantize import capture, quantize
from .telemetry import Telemetry
from .compare import Comparison, compare  # after what it compares
from .sensitivity import Sensitivity, sensitivity
from . import qat

__version__ = build_info()["version"]

#: For C++ projects: -DCMAKE_PREFIX_PATH=$(python -c "import probquant; print(probquant.cmake_prefix_path)")
cmake_prefix_path = str(_folder / "lib" / "cmake")

__all__ = [
    "Activation",
    "Capture",
    "Comparison",
    "LayerInfo",
    "QuantizedModel",
    "Sensitivity",
    "Strategy",
    "Telemetry",
    "build_info",
    "capture",
    "cmake_prefix_path",
    "compare",
    "cpu_info",
    "load",
    "ops",
    "ops_library",
    "qat",
    "quantize",
    "save",
    "sensitivity",
    "validate",
]
