"""Memory of a long prompt: every tensor that prefill makes is bounded by chunk x prompt."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_models import random_ids, tiny_model
from twotower.model.two_tower import PREFILL_CHUNK

MODEL = tiny_model(hybrid_override_pattern="M*E-")


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4, 1)
        return result


def largest(length: int, chunk_size: int) -> int:
    with LargestTensor() as seen:
        MODEL.prefill(random_ids(1, length), chunk_size=chunk_size)
    return seen.numel


def test_a_long_prompt_allocates_no_square() -> None:
    """Guards prefill of long prompts: one tensor of length x length is 64 GB at 128k tokens."""
    heads = 4  # of tiny_config
    assert PREFILL_CHUNK <= 1024
    assert largest(4096, PREFILL_CHUNK) <= heads * PREFILL_CHUNK * 4096


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    """The same claim without reference to a size: twice the prompt, at most twice the tensor."""
    short, long = largest(1024, 64), largest(2048, 64)
    assert long <= 2.1 * short
    assert largest(2048, 2048) > 4 * long, "this test can see a square"
