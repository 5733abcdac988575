"""bfloat16 as a Zarr data type, for reading a bf16 cache with zarr-python.

The Zarr extension registry knows `bfloat16`, and tensorstore and zarrs read it; zarr-python does not yet. Storing the
bits as uint16 instead would make every other reader take them for numbers. `register()` teaches zarr-python, and has to
be called: importing this module changes nothing. Our own reader does not need it.

The v2 format is refused, since it has no name for this type.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard

import ml_dtypes
import numpy as np
import zarr.dtype
from zarr.dtype import ZDType, data_type_registry

try:
    from zarr.dtype import DataTypeValidationError  # zarr 3.1
except ImportError:  # moved in zarr 3.2
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined,no-redef]

_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16(ZDType[Any, Any]):
    """The upper half of a float32: 8 bits of exponent, 7 of fraction."""

    dtype_cls: ClassVar[Any] = type(_NATIVE)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        return 2

    @classmethod
    def _check_native_dtype(cls, dtype: Any) -> TypeGuard[Any]:
        return dtype == _NATIVE

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        if dtype == _NATIVE:
            return cls()
        raise DataTypeValidationError(f"Invalid data type: {dtype}. Expected {_NATIVE}")

    def to_native_dtype(self) -> Any:
        return _NATIVE

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"bfloat16 does not exist in Zarr v2 (got {data!r}); use Zarr v3")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"Invalid JSON representation of bfloat16: {data!r}")

    def to_json(self, zarr_format: Any) -> Any:
        if zarr_format == 3:
            return self._zarr_v3_name
        raise ValueError("bfloat16 does not exist in Zarr v2; use zarr_format=3")

    def _check_scalar(self, data: object) -> Any:
        return isinstance(data, (int, float, np.floating, np.integer, ml_dtypes.bfloat16))

    def cast_scalar(self, data: object) -> Any:
        if self._check_scalar(data):
            return ml_dtypes.bfloat16(data)
        raise TypeError(f"Cannot convert {data!r} to bfloat16")

    def default_scalar(self) -> Any:
        return ml_dtypes.bfloat16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """A number, "NaN", "Infinity", "-Infinity", or the bits as "0x…"."""
        if isinstance(data, str) and data.startswith("0x"):
            return np.uint16(int(data, 16)).view(_NATIVE)
        if isinstance(data, str) and data not in ("NaN", "Infinity", "-Infinity"):
            raise TypeError(f"Invalid fill value for bfloat16: {data!r}")
        return ml_dtypes.bfloat16(float(data))

    def to_json_scalar(self, data: object, *, zarr_format: Any) -> Any:
        value = float(self.cast_scalar(data))
        if np.isnan(value):
            return "NaN"
        if np.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value


def register() -> None:
    """Teach zarr-python in this process to read and write `bfloat16` arrays. May be called again."""
    if "bfloat16" not in data_type_registry.contents and not hasattr(zarr.dtype, "BFloat16"):
        data_type_registry.register("bfloat16", BFloat16)
