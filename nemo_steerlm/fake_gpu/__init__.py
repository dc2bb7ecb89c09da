"""The GPU path on a machine without a GPU: one rank of a job of any size, on CUDA tensors that hold no data.

The project's model, megatron-core's data-parallel wrapper, optimizer and schedules, and Lightning's loop run as they
are. CPU tensors are real. CUDA tensors are torch's fake ones: they have a shape, a type and a device. The process
group is torch's fake one: the other ranks exist in its size only.

    def steps(gpu, rows):                       # a function of a test module
        ...                                     # parallel.device() is "cuda" in here
        return {"peak": gpu.memory.peak, "waits": dict(gpu.waits)}

    def test_steps(room):
        assert room.run(steps, rank=0, world=8, rows=2)["waits"] == {}

What a test sees: operations that mix devices, groups that are missing, tensors that a group's backend cannot send,
where the host waits for the device, bytes by part of the training, bytes sent by collective.

What no test here can see: values (what comes back from the device is 0, or what was sent there), races, memory inside
of a kernel (workspaces of cuBLAS and flash attention), NCCL's buffers, the CUDA context, fragmentation, the kernels of
Transformer Engine and apex, and whatever depends on the values of a mask (one that only the device knows is taken to
choose all rows; `FakeGpu.assumed` says where).
"""
