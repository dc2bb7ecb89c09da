"""The GPU path on a machine without a GPU: one rank of a job of any size, on CUDA tensors that hold no data.

The project's model, megatron-core's data-parallel wrapper, optimizer and schedules, and Lightning's loop run as they
are. CPU tensors are real. CUDA tensors are torch's fake ones: they have a shape, a type and a device. The process
group is torch's fake one: the other ranks exist in its size only.

    def steps(gpu, rows):                       # a function of a module
        ...                                     # parallel.device() is "cuda" in here
        return {"peak": gpu.memory.peak, "waits": dict(gpu.waits)}

    with Room() as room:
        room.run(steps, rank=0, world=8, rows=2)["waits"]

Where torch takes an operation apart on a CPU, or asks a GPU which kernel to take, a rule stands for the CUDA kernel:

- RMSNorm: one kernel, which keeps its input and one fp32 number a token (`cuda._FusedRMSNorm`).
- Attention: flash attention in half precision without a mask, else the memory-efficient kernel (`cuda._attention_of`).
- Attention in packed rows: torch's own rule for `varlen_attn`, one kernel that keeps its inputs, its output and the
  log-sum-exp.
- LayerNorm and fused AdamW: one kernel each, by torch's own rules.
- Derivatives of indexing: in place, where torch makes a copy because a tensor is fake (`mode._DERIVATIVES`).

No rule is needed for SwiGLU, squared ReLU, RoPE and cross-entropy: without Transformer Engine they are the same calls
on both devices. So is a weight's gradient, a tensor of its own that is added to the buffer, as without apex.

`tests/fake_gpu/test_memory.py` holds the counted bytes against those that a CPU really allocates.

What a test sees: operations that mix devices, groups that are missing, tensors that a group's backend cannot send,
where the host waits for the device, bytes by part of the training, bytes sent by collective.

What nobody here can see: values (what comes back from the device is 0, or what was sent there), races, memory inside
of a kernel (workspaces of cuBLAS and flash attention), NCCL's buffers, the CUDA context, fragmentation, the kernels of
Transformer Engine and apex, and whatever depends on the values of a mask (one that only the device knows is taken to
choose all rows; `FakeGpu.assumed` says where).
"""
