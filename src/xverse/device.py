"""The device that models run on: chosen here for every command, with the reason when it is not the GPU."""

from __future__ import annotations

import argparse
import contextlib
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xverse import nvidia
from xverse.config import UserError, nearest
from xverse.values import whole

if TYPE_CHECKING:
    import torch

NO_GPU = "no GPU found"
_KNOWN = ("auto", "cpu", "cuda", "mps")
_SYNTAX = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_HELP = "auto (the default): an NVIDIA GPU if PyTorch can use one, else the CPU; or cpu, cuda, cuda:N, mps"


def add_device(parser: argparse._ActionsContainer) -> None:
    """The flag ``--device``. Imports nothing heavy."""
    parser.add_argument("--device", type=_flag, default="auto", metavar="D", help=_HELP)


def add_tensor_parallel(parser: argparse._ActionsContainer) -> None:
    """The flag ``--tensor-parallel``."""
    text = "divide the model over N GPUs, or over N processes with --device cpu"
    parser.add_argument("--tensor-parallel", type=whole(1, 64), default=1, metavar="N", help=text)


def _flag(text: str) -> str:
    try:
        return check_name(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--device: ")) from None


def check_name(name: str) -> str:
    """``name`` if it has the form of a device. Raises UserError for any other text."""
    if not _SYNTAX.fullmatch(name):
        why = f"xverse does not run on {name}" if name.partition(":")[0] in ("xpu", "npu", "hpu") else ""
        why = why or f"unknown device '{name}'{nearest(name, _KNOWN)}"
        raise UserError(f"--device: {why} (known: auto, cpu, cuda, cuda:N, mps)")
    return name


def compute_device(name: str = "auto", process: int | None = None) -> torch.device:
    """The device called ``name``. ``auto`` and ``cuda`` take the first CUDA device that PyTorch can
    use, or the one of a launched ``process`` on this machine; ``auto`` falls back to the CPU.

    Raises UserError for an unknown name and for a device that cannot be used, with the reason.
    """
    import torch

    check_name(name)
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: PyTorch finds no Apple GPU on this machine; use --device cpu")
        return torch.device("mps")
    count = _cuda_count()
    candidates = list(range(count))
    if name.startswith("cuda:"):
        number = int(name.partition(":")[2])
        if count and number >= count:
            there = "cuda:0 is the only GPU" if count == 1 else f"there are cuda:0 to cuda:{count - 1}"
            raise UserError(f"--device {name}: no such GPU; {there}")
        candidates = candidates[number : number + 1]
    elif process is not None and count:
        if process >= count:
            raise UserError(f"each process needs a GPU, and this machine has {count}; launch at most {count}")
        candidates = [process]
    usable = next((number for number in candidates if not _unsupported(number)), None)
    if usable is not None:
        return torch.device("cuda", usable)
    if name == "auto":
        return torch.device("cpu")
    reason = _unsupported(candidates[0]) if candidates else why_no_gpu()
    raise UserError(f"--device {name}: {reason}{'' if ';' in reason else '; use --device auto or cpu'}")


def describe(device: torch.device, name: str = "auto") -> str:
    """One sentence on the ``device`` that was chosen for ``name``: which GPU, or why the CPU."""
    if device.type == "cuda":
        import torch

        title = _query(torch.cuda.get_device_name, device) or "CUDA GPU"
        capability = _capability(device.index or 0)
        total = _query(lambda: torch.cuda.get_device_properties(device).total_memory)
        facts = [title]
        facts += [f"{total / 2**30:.0f} GiB"] if total else []
        facts += [f"compute capability {capability[0]}.{capability[1]}"] if capability else []
        return f"running on {device}: {', '.join(facts)}"
    if device.type == "mps":
        return "running on mps: Apple's GPU (not measured)"
    return "running on the CPU" + (f": {why_no_gpu()}" if name == "auto" else ", as chosen by --device")


def why_no_gpu() -> str:
    """Why ``auto`` means the CPU on this machine, and what would change that."""
    import torch

    if count := _cuda_count():
        return "; ".join(dict.fromkeys(filter(None, map(_unsupported, range(count)))))
    gpus = nvidia.cards()
    version = f"PyTorch {torch.__version__}"
    if gpus.problem:
        return f"nvidia-smi fails ({gpus.problem}); reinstall the NVIDIA driver"
    if gpus.capabilities:
        cuda = torch.version.cuda
        if cuda is None:
            return f"{version} is built without CUDA, although there is {gpus}; {nvidia.install_hint(gpus)}"
        needed = nvidia.driver_for(cuda)
        if gpus.release < needed:
            return (
                f"{version} (CUDA {cuda}) needs driver {needed} or newer, and there is {gpus}; "
                f"{nvidia.install_hint(gpus)}"
            )
        reason = _cuda_warning()
        return (
            f"{version} finds no CUDA device, although there is {gpus}; "
            f"{reason or 'check CUDA_VISIBLE_DEVICES'}"
        )
    if torch.backends.mps.is_available():
        return "--device mps uses Apple's GPU for unquantised weights (not measured)"
    if nvidia.amd_gpu():
        return f"{version} is built without ROCm, although there is an AMD GPU; install PyTorch's ROCm build"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xverse does not use Intel GPUs"
    if nvidia.ascend_npu():
        return "xverse does not use Ascend NPUs, except through transformers' Trainer in xverse finetune"
    return NO_GPU


def report_unused_gpu(device: torch.device) -> None:
    """Print why ``auto`` became the CPU on a machine with a GPU."""
    from xverse.log import notice

    if device.type == "cpu" and (reason := why_no_gpu()) != NO_GPU:
        notice(f"running on the CPU: {reason}")


def usable_gpus() -> list[int]:
    """The CUDA devices for which PyTorch has machine code."""
    return [index for index in range(_cuda_count()) if not _unsupported(index)]


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` the current CUDA device: kernels, streams and graphs without a device use that one."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    import torch

    return torch.cuda.device(device)


def weights_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of weights and activations on ``device``; None on a CPU, where it depends on the model.

    GPUs before compute capability 8.0 have no bfloat16 units and take float16.
    """
    import torch

    from xverse.gpu import MATRIX_UNITS

    if device.type == "cuda":
        capability = _capability(device.index or 0) or MATRIX_UNITS
        return torch.bfloat16 if capability >= MATRIX_UNITS else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    return None


def is_lost(error: BaseException) -> bool:
    """Whether a CUDA error has made the device unusable for this process: every later call will fail, too.
    Running out of memory has not."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    sticky: type[BaseException] | None = getattr(torch, "AcceleratorError", None)
    return (sticky is not None and isinstance(error, sticky)) or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def _cuda_count() -> int:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old; why_no_gpu reports it
        return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 0


def _cuda_warning() -> str:
    """PyTorch's own reason for finding no device."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    return " ".join(str(caught[0].message).split())[:200] if caught else ""


def _unsupported(index: int) -> str:
    """Why PyTorch cannot run on this CUDA device; "" if it can."""
    import torch

    capability = _capability(index)
    built = _query(torch.cuda.get_arch_list)
    if capability is None or not built or torch.version.hip:
        return ""
    if any(_runs(architecture, capability) for architecture in built):
        return ""
    older = 10 * capability[0] + capability[1] < min(filter(None, map(_number, built)))
    remedy = "install another build (TORCH_INDEX=https://download.pytorch.org/whl/cu126)"
    return (
        f"cuda:{index} has compute capability {capability[0]}.{capability[1]}, and PyTorch "
        f"{torch.__version__} supports {', '.join(built)}; {remedy if older else 'update PyTorch'}"
    )


def _number(architecture: str) -> int:
    match = re.search(r"_(\d+)", architecture)
    return int(match[1]) if match else 0


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``architecture`` (sm_86, compute_90) runs on a GPU: machine code on the same
    major version from its own minor version on, PTX on all newer ones."""
    number, wanted = _number(architecture), 10 * capability[0] + capability[1]
    if architecture.startswith("compute_"):
        return number <= wanted
    return number // 10 == capability[0] and number <= wanted


def _capability(index: int) -> tuple[int, int] | None:
    import torch

    return _query(torch.cuda.get_device_capability, index)


def _query(ask: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of the driver, or None where it gives none."""
    with contextlib.suppress(RuntimeError, AssertionError, AttributeError):
        return ask(*arguments)
    return None
