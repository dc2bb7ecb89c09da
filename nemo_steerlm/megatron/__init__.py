"""The engine room: everything that touches megatron-core. Import `parallel` first; it installs the CPU backend."""
