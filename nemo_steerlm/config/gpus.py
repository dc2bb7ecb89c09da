"""The GPUs that a layout can be for: memory, speed and bandwidths from NVIDIA's data sheets, of one GPU.

Data sheets give FLOP/s with structured sparsity, which doubles the figure; dense products, as here, reach half of it.

- A100: "NVIDIA A100 Tensor Core GPU" (2021), the SXM columns
- H100: "NVIDIA H100 Tensor Core GPU" (2023), the SXM column
- H200: "NVIDIA H200 Tensor Core GPU" (2024), the SXM column
- B200: "NVIDIA DGX B200" (2024), an eighth of the system
- L40S: "NVIDIA L40S" (2023); it has no NVLink
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        label: its name in prose.
        memory: bytes; the data sheet's decimal gigabytes. CUDA reports up to 6% more on the cards with HBM.
        flops: dense bfloat16 FLOP/s at the peak.
        bandwidth: of its memory, bytes/s.
        nvlink: to the other GPUs of its node, both directions together, bytes/s; 0 = PCIe only.
        fp8: whether it computes in fp8, at twice `flops`.
    """

    label: str
    memory: float
    flops: float
    bandwidth: float
    nvlink: float
    fp8: bool = True


#: By the names that `trainer.gpu` takes.
GPUS: dict[str, Gpu] = {
    "a100_40g": Gpu("A100-40G", memory=40e9, flops=312e12, bandwidth=1.555e12, nvlink=600e9, fp8=False),
    "a100_80g": Gpu("A100-80G", memory=80e9, flops=312e12, bandwidth=2.039e12, nvlink=600e9, fp8=False),
    "h100_80g": Gpu("H100-80G", memory=80e9, flops=989.4e12, bandwidth=3.35e12, nvlink=900e9),
    "h200_141g": Gpu("H200-141G", memory=141e9, flops=989.4e12, bandwidth=4.8e12, nvlink=900e9),
    "b200_180g": Gpu("B200-180G", memory=180e9, flops=2250e12, bandwidth=8e12, nvlink=1800e9),
    "l40s_48g": Gpu("L40S-48G", memory=48e9, flops=362e12, bandwidth=864e9, nvlink=0.0),
}
