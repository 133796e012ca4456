// What torch's C++ asks of CUDA on a machine without it: a device guard that does nothing, and hooks that say "yes, one".
// Autograd needs a guard for every device type that it meets; pinned memory is asked of the hooks, and here the CPU's with a name.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <unordered_set>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device kDevice(DeviceType::CUDA, 0);

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return kDevice; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kDevice); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, kDevice); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};

std::mutex pinned_mutex;
std::unordered_set<const void*> pinned;

struct PinnedAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes ? bytes : 1);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert(memory);
    return {memory, memory, &release, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  static void release(void* memory) {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(memory);
    c10::free_cpu(memory);
  }
};

struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  // A build with CUDA asks before it chooses an attention.
  long versionCuDNN() const override { return 91000; }
  long versionRuntimeCuDNN() const override { return 91000; }
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 0; }  // so that nothing is initialized
  bool isPinnedPtr(const void* memory) const override {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    return pinned.count(memory) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
};

struct Install {
  Install() {
    c10::impl::registerDeviceGuard(DeviceType::CUDA, new Guard);
    // The hooks were made when the first one asked for them, and are const from then on: give that object our answers.
    static Hooks ours;
    auto& theirs = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
    *reinterpret_cast<void**>(&theirs) = *reinterpret_cast<void**>(&ours);
  }
} install;

}  // namespace
