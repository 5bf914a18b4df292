"""Settings of torch by which the same request gives the same bits."""

from __future__ import annotations

import os

import torch


def configure_determinism(threads: int, invariant: bool) -> None:
    """Set the number of CPU threads (0: torch's choice); with `invariant`, make every bit reproducible.

    These effects were measured on a CPU, with a small UNet of convolutions, attention and norms. The code
    here and in TorchRunner prevents them:
    - The number of rows changes a row's bits in float32 (1e-6 for values near 1), at 1, 2, 4, 8 and 16 rows,
      with one thread as with two; so does the VAE decoder with one image against many. Hence one bucket, and
      one image at a time.
    - A row's position in a call and its neighbours change nothing with 1 and with 2 threads. With 3 threads
      the position does: work is cut into equal parts, and where a part ends inside a vector its last values
      are computed one by one with another exp(). Hence a power of two, which cuts evenly.
    - With 2 threads on an AMD EPYC, a row's position changes MKL's matrix products, unless MKL_CBWR asks for
      strict reproducibility before the first product.
    - 1 and 2 threads give the same results at some sizes only, so thread counts must be equal, too.
    - An input at an odd address changes nothing; channels_last does (2e-6), and is not used on a CPU.
    - In bfloat16, with one thread on a CPU with AVX512-BF16, neither row counts nor positions changed a bit
      of that UNet; with AMX one row and many differ by 1%. bfloat16 is treated as float32 is.
    """
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference for float16
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # sums in float16 can overflow
    if threads:
        torch.set_num_threads(threads)
    if invariant:
        torch.set_num_threads(floor_power_of_two(torch.get_num_threads()))
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS may vary between calls without it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by a module class
        torch.backends.cudnn.benchmark = False


def floor_power_of_two(number: int) -> int:
    """The largest power of two that is not larger than `number`."""
    return 1 << (number.bit_length() - 1)
