"""What nobody foresaw gets the code that says whether another try helps."""

import pytest
import torch

from core.jobs.runner import classify


def test_memory_that_torch_cannot_get_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)

    assert classify(caught.value).code() == "out_of_memory"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes."),
    ],
)
def test_no_memory_is_known_by_what_libraries_say(error: Exception) -> None:
    assert classify(error).code() == "out_of_memory"


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_anything_else_is_a_crash(error: Exception) -> None:
    assert classify(error).code() == "chunk_crashed"
