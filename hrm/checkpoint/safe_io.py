"""Writes checkpoint files durably, and reads untrusted ones safely.

Reading constructs tensors, numbers, strings and plain containers only, never a pickled object, and takes
little more memory than the size of the file.
"""

import errno
import hashlib
import io
import os
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hrm.common.errors import UserError
from hrm.common.files import open_bounded
from hrm.common.text import error_text

# Maximum bytes of a header, a pickle or an archive's table of contents. The training state of a thousand
# layers per level takes less.
DESCRIPTION_LIMIT = 1 << 22
# The only names in a pickle of plain tensors. PyTorch's restricted unpickler allows more, some of which take
# unbounded memory (bytearray) or create tensors larger than their data.
_NAMED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|"
    r"torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
_MAKES_OBJECTS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
# Further names that PyTorch resolves, to values no larger than their arguments.
_PLAIN = re.compile(r"_codecs encode|torch (Size|device|b?float\d+|u?int\d+|bool)")


class _Resolver(type):
    def __call__(cls, *_: Any) -> Any:
        return object.__new__(cls)  # type: ignore[arg-type]


class _Unread(metaclass=_Resolver):
    """Replaces any class or function that a foreign pickle names.

    A call returns an empty object; `NEWOBJ` returns an empty dict, which keeps the items of a dict subclass.
    """

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()

    def __setstate__(self, state: Any) -> None:
        pass


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or used; the message names the file or field and a remedy."""


def compact(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor on the CPU, with its own storage.

    safetensors refuses tensors that share a storage, and torch.save would write the whole shared storage.
    """
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def plain(value: Any, where: str) -> Any:
    """A copy of nested dicts, lists and tuples of tensors, numbers, strings and None; tensors are compact.

    Raises TypeError with the place of anything else, which the restricted unpickler would refuse to read.
    """
    if isinstance(value, Tensor):
        return compact(value)
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: key {key!r} is a {type(key).__name__}; a str or int is needed")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    # exact types from here on: a np.float64 is a float too, but is pickled as an object
    if type(value) in (list, tuple):
        return type(value)(plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}; only tensors, numbers and strings can be saved")


def _check_plain(value: Any, limit: int, seen: set[int]) -> None:
    """Raises ValueError unless value is a result of `plain`: a tree without tensors over `limit` bytes."""
    if type(value) is Tensor:
        usual = value.layout == torch.strided and value.device.type == "cpu" and value.is_contiguous()
        if not usual or value.nbytes > limit:
            raise ValueError("a tensor of an unusual kind or size")
    elif type(value) in (dict, list, tuple):
        # shared containers could unfold exponentially, cyclic ones for ever; a save writes neither
        if value and id(value) in seen:
            raise ValueError("a container that occurs twice")
        seen.add(id(value))
        for item in (*value, *value.values()) if type(value) is dict else value:
            _check_plain(item, limit, seen)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"a {type(value).__name__}")


def nbytes(value: Any) -> int:
    """The size in bytes of the result of `plain`: its tensors, and a few bytes for each number."""
    if isinstance(value, dict):
        return sum(map(nbytes, value.values()))
    return sum(map(nbytes, value)) if isinstance(value, list | tuple) else getattr(value, "nbytes", 8)


def read_safetensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Tensors of a .safetensors file; raises CheckpointError for a damaged one."""
    try:
        with open_bounded(path) as file:
            header = int.from_bytes(file.read(8), "little")
        if header > DESCRIPTION_LIMIT:
            raise ValueError("its header is too long")
        return load_file(path, device=str(device))
    # absurd headers, dtypes and devices raise errors of many types
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error_text(error)}); use another checkpoint"
        ) from error


def read_training(path: Path) -> dict[str, Any]:
    """The dict that torch.save wrote from `plain`; raises CheckpointError for anything else."""
    value = read_torch(path)
    try:
        if type(value) is not dict:
            raise ValueError("not a dict")
        _check_plain(value, path.stat().st_size, set())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not the training state of a checkpoint ({error_text(error)}); use another one"
        ) from error
    return value


def read_torch(path: Path, foreign: bool = False) -> Any:
    """A file that torch.save wrote, on the CPU; tensors are memory maps of the file.

    Raises CheckpointError for anything but tensors and plain containers; runs no code from the file. foreign:
    the file is a dict, and other objects in it become empty objects, such as NumPy's random state.
    """
    try:
        unread = _check_archive(path, foreign)
        with torch.serialization.safe_globals([(_Unread, name) for name in unread]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251
    # on damaged bytes the unpickler and the archive reader raise errors of nearly any type
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a torch file of plain tensors and numbers ({error_text(error)}); use another one"
        ) from error


class _SmallReads(io.FileIO):
    """A file that rejects large reads, such as a long table of contents."""

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(DESCRIPTION_LIMIT + 1 if size is None or size < 0 else size)
        if len(content) > DESCRIPTION_LIMIT:
            raise ValueError("its archive has too long a table of contents")
        return content


def _check_archive(path: Path, foreign: bool = False) -> set[str]:
    """Raises ValueError unless torch.save could have written the archive, its pickle holding tensors only.

    foreign: returns the names of other objects instead of raising.
    """
    unread = set()
    open_bounded(path).close()
    with _SmallReads(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        # torch.save never compresses; a compressed member could expand to any size in memory
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("its archive is compressed or overlaps itself")
        # make sure that torch reads the pickle checked here
        if len(pickles) != 1 or len(set(names)) < len(names) or len({n.partition("/")[0] for n in names}) > 1:
            raise ValueError("its archive is not as torch.save writes one")
        if pickles[0].file_size > DESCRIPTION_LIMIT:
            raise ValueError("its pickle is too long")
        for operation, argument, _ in pickletools.genops(archive.read(pickles[0])):
            named = operation.name == "GLOBAL" and _NAMED.fullmatch(str(argument)) is None
            if foreign and named and _may_stay_unread(str(argument)):
                if not _PLAIN.fullmatch(str(argument)):
                    unread.add(str(argument).replace(" ", "."))
            elif foreign and operation.name == "NEWOBJ":
                continue
            elif named or operation.name in _MAKES_OBJECTS:
                what = str(argument or "objects").replace(" ", ".")[:100]
                raise ValueError(f"it refers to {what}, which was not run")
    return unread


def _may_stay_unread(name: str) -> bool:
    """Whether a name is harmless: PyTorch does not resolve it, or resolves it to a plain value."""
    own = name.startswith(("torch ", "torch.", "builtins ", "__builtin__ ", "collections "))
    return name.isascii() and name.isprintable() and (not own or _PLAIN.fullmatch(name) is not None)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    # Windows cannot open a folder
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error of safetensors (in its text) or torch (as its context), or None."""
    while error is not None and not isinstance(error, OSError):
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        if isinstance(error, SafetensorError) and number:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return error
