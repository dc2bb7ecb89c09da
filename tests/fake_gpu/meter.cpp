// Counts the bytes that torch allocates on the CPU, in all threads, those inside of operations too.
// (torch's profiler misses what the threads of gloo allocate or free.)
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

namespace {

std::mutex mutex;
std::unordered_map<void*, int64_t> sizes;
int64_t now = 0, peak = 0;

void release(void* pointer) {
  if (pointer == nullptr) return;
  {
    std::lock_guard<std::mutex> guard(mutex);
    auto found = sizes.find(pointer);
    now -= found->second;
    sizes.erase(found);
  }
  c10::free_cpu(pointer);
}

struct Meter final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* pointer = size ? c10::alloc_cpu(size) : nullptr;
    if (pointer != nullptr) {
      std::lock_guard<std::mutex> guard(mutex);
      sizes[pointer] = static_cast<int64_t>(size);
      now += static_cast<int64_t>(size);
      peak = std::max(peak, now);
    }
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

Meter meter;

}  // namespace

extern "C" {
void meter_start() { c10::SetCPUAllocator(&meter, 255); }
void meter_restart() { std::lock_guard<std::mutex> guard(mutex); peak = now; }
int64_t meter_now() { return now; }
int64_t meter_peak() { return peak; }
}
