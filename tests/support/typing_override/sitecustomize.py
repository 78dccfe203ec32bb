"""First on the path of a Python before 3.12, it lets megatron-core 0.19, which imports `typing.override`, run there."""

import typing

import typing_extensions

typing.override = typing_extensions.override
