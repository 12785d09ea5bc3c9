"""The exception classes and the mapping from the core's errors."""

from __future__ import annotations

from pathlib import Path

import pytest

import nanobraid as nb
from nanobraid import _core, errors


@pytest.mark.parametrize(
    ("code", "cls", "builtin"),
    [
        ("invalid_argument", nb.InvalidArgumentError, ValueError),
        ("unsupported", nb.UnsupportedError, NotImplementedError),
        ("format", nb.FormatError, ValueError),
        ("io", nb.ModelIOError, OSError),
        ("out_of_memory", nb.OutOfMemoryError, MemoryError),
        ("overloaded", nb.OverloadedError, RuntimeError),
        ("device", nb.DeviceError, RuntimeError),
        ("internal", nb.InternalError, RuntimeError),
        ("a code of the future", nb.InternalError, RuntimeError),
    ],
)
def test_codes_map_to_classes(code: str, cls: type[nb.NanobraidError], builtin: type[Exception]) -> None:
    core_error = _core.CoreError("what and where")
    core_error.code = code
    error = errors.map_core_error(core_error)
    assert type(error) is cls
    assert isinstance(error, builtin)
    assert isinstance(error, nb.NanobraidError)
    assert str(error) == "what and where"


def test_classes_of_the_package_itself() -> None:
    assert issubclass(nb.ModelNotFoundError, FileNotFoundError)
    assert issubclass(nb.DownloadError, OSError)
    assert issubclass(nb.ChatTemplateError, ValueError)
    assert str(nb.ModelNotFoundError("no model 'x'")) == "no model 'x'"


def test_a_real_error_of_the_core_arrives_with_its_code(tmp_path: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("this is not a model file, though it is long enough to look at")
    with pytest.raises(nb.FormatError) as caught, errors.core_errors():
        _core.inspect_file(str(file))
    assert isinstance(caught.value.__cause__, _core.CoreError)
    assert caught.value.code == "format"
    assert "text.gguf" in str(caught.value)


def test_other_exceptions_pass_through() -> None:
    with pytest.raises(KeyError), errors.core_errors():
        raise KeyError("mine")
