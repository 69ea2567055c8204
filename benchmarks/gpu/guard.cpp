// A device guard that does nothing, for CUDA. PyTorch's builds without CUDA have none, and indexing or a tensor
// that records gradients ask for it even if all tensors are fake.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
struct Guard final : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {};
}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
