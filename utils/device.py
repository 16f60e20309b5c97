"""What a run computes on, and how a GPU says that its memory is full."""

import errno

import torch

# In place of an OutOfMemoryError, near a GPU's limit: of cudnn, cublas, pinned memory of the host.
MEMORY_ERRORS = ("out of memory", "unable to find an engine", "STATUS_ALLOC_FAILED", "STATUS_NOT_INITIALIZED")
# Of torch's allocator, of C++, of oneDNN (which could not create, or execute, one), of a thread's stack.
HOST_MEMORY_ERRORS = ("can't allocate memory", "bad_alloc", "a primitive", "can't start new thread")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed for want of memory on a GPU, or of pinned memory, whatever it calls that."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in MEMORY_ERRORS)


def is_host_memory_full(error: BaseException) -> bool:
    """Whether Python, torch or what they call failed for want of memory of the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = isinstance(error, RuntimeError) and any(word in str(error) for word in HOST_MEMORY_ERRORS)
    return words or isinstance(error, MemoryError)


def describe_device(device: torch.device) -> str:
    """One line: the device, a GPU's name and free memory or why there is none, torch's version."""
    version = f"torch {torch.__version__}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return f"running on {device} ({name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free), {version}"
    reason = why_no_gpu() if device.type == "cpu" else ""
    return f"running on {device} ({torch.get_num_threads()} threads), {version}{reason and f'; no GPU: {reason}'}"


def why_no_gpu() -> str:
    """Why a build of torch for CUDA cannot use it; empty if it can, or is not one."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
    return f"CUDA {torch.version.cuda} finds no device"


def copied_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU on `device`, in a copy that no GPU is waited for."""
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)
