// An accelerator that is not there: tensors of a device of their own, which the CPU computes.
//
// What it is for is what it refuses and counts. Tensors of the host and of the device do not mix. Each launch, each
// upload and each read by the host is counted, and reads can be made errors. Numbers are those of the CPU's kernels, so
// that equality with a run on the CPU is exact.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <set>
#include <string>

namespace {

using at::Tensor;
constexpr auto DEVICE = c10::DeviceType::PrivateUse1;
const c10::Device HERE(DEVICE, 0);

struct Counts {
  int64_t launches = 0, uploads = 0, reads = 0;
  std::map<std::string, int64_t> why;  // of reads and uploads
};
Counts counts;
bool forbidden = false;  // reads are errors

void read_by_host(const std::string& why) {
  TORCH_CHECK(!forbidden, "the host waits for the device: ", why);
  ++counts.reads;
  ++counts.why["read: " + why];
}

bool is_here(const Tensor& t) { return t.defined() && t.device().type() == DEVICE; }

// Memory is the host's, of another name.
struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto data = c10::GetAllocator(c10::kCPU)->allocate(size);
    void* pointer = data.get();
    return {pointer, new c10::DataPtr(std::move(data)), [](void* own) { delete static_cast<c10::DataPtr*>(own); }, HERE};
  }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
};
Memory memory;
REGISTER_ALLOCATOR(DEVICE, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream only() const { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::DeviceType type() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return only(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Random numbers of the device are apart from those of the host.
at::Generator& generator() {
  static at::Generator own = at::detail::createCPUGenerator();
  return own;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto data = memory.allocate(size);
    std::memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// The same memory as a tensor of the CPU.
Tensor on_host(const Tensor& t) {
  if (!is_here(t)) return t;
  auto options = at::TensorOptions().dtype(t.scalar_type());
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  char* start = static_cast<char*>(t.storage().mutable_data()) + t.storage_offset() * t.element_size();
  Tensor same = at::from_blob(start, t.sizes(), t.strides(), options);
  if (t.is_conj()) same._set_conj(true);
  if (t.is_neg()) same._set_neg(true);
  return same;
}

// A tensor of the CPU, as one of the device that owns its memory.
Tensor on_device(const Tensor& t) {
  if (!t.defined() || is_here(t)) return t;
  Tensor base = t.resolve_conj().resolve_neg();
  int64_t extent = base.numel() ? 1 : 0;
  for (int64_t d = 0; base.numel() && d < base.dim(); ++d) extent += (base.size(d) - 1) * base.stride(d);
  auto own = new Tensor(base);
  c10::DataPtr data(base.mutable_data_ptr(), own, [](void* kept) { delete static_cast<Tensor*>(kept); }, HERE);
  c10::Storage storage(c10::Storage::use_byte_size_t(), extent * base.element_size(), std::move(data), &memory, true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), base.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(base.sizes(), base.strides());
  return made;
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

Tensor as_strided(const Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(),
                                                       t.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(offset.value_or(t.storage_offset()));
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return view;
}

const Tensor& resized(const Tensor& t, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* own = t.unsafeGetTensorImpl();
  own->set_sizes_contiguous(size);
  size_t bytes = (t.storage_offset() + t.numel()) * t.element_size();
  if (bytes > t.storage().nbytes()) Hooks().resizePrivateUse1Bytes(t.storage(), bytes);
  return t;
}

Tensor copied(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (is_here(from) && is_here(to)) {
    ++counts.launches;
  } else if (is_here(from)) {
    // Also where it does not block: the host has to wait before it looks.
    read_by_host("copy to the host");
  } else {
    ++counts.uploads;
    ++counts.why[non_blocking ? "upload" : "upload that blocks"];
  }
  at::NoGradGuard no_grad;
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_and_resize(const Tensor& from, const Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copied(from, to, false);
}

c10::Scalar scalar(const Tensor& t) {
  read_by_host("a number");
  return on_host(t).item();
}

// Those whose results, or whose checks, a real device hands to the host.
const std::set<std::string> READS = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::linalg_lstsq",
    "aten::_linalg_eigh", "aten::_linalg_svd", "aten::linalg_eig", "aten::_linalg_eigvals", "aten::unique_consecutive"};

bool is_mask(const c10::IValue& index) {
  if (!index.isTensor() || !index.toTensor().defined()) return false;
  return index.toTensor().scalar_type() == c10::kBool || index.toTensor().scalar_type() == c10::kByte;
}

void count(const std::string& name, const std::vector<c10::IValue>& given) {
  ++counts.launches;
  if (READS.count(name)) read_by_host(name);
  bool is_index = name == "aten::index" || name == "aten::index_put" || name == "aten::_index_put_impl_";
  if (is_index && given[1].isList())
    for (const c10::IValue& index : given[1].toListRef())
      if (is_mask(index)) return read_by_host(name + " by a mask");
}

// Every kernel that is not registered below: the CPU's, on the same memory.
void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  size_t n = schema.arguments().size();
  std::vector<c10::IValue> given(stack->end() - n, stack->end());
  count(schema.name(), given);
  bool is_index = schema.name().find("index") != std::string::npos;
  auto host = [&](const Tensor& t) {
    TORCH_CHECK(!t.defined() || is_here(t) || t.dim() == 0 || is_index, "tensors of the host and of the device in ",
                schema.name());
    return t.defined() ? on_host(t) : t;
  };
  std::vector<std::pair<Tensor, Tensor>> written;
  torch::jit::Stack arguments;
  for (size_t i = 0; i < n; ++i) {
    c10::IValue value = given[i];
    const auto* alias = schema.arguments()[i].alias_info();
    bool writes = alias && alias->isWrite();
    // A result that is given may get another shape.
    bool is_out = writes && schema.arguments()[i].kwarg_only();
    auto taken = [&](const Tensor& t) {
      Tensor same = is_out ? at::empty({0}, at::TensorOptions().dtype(t.scalar_type())) : host(t);
      if (writes) written.emplace_back(t, same);
      return same;
    };
    if (value.isTensor()) {
      value = taken(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(taken(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const c10::IValue& t : value.toListRef())
        list.push_back(t.isNone() ? std::nullopt : std::optional<Tensor>(taken(t.toTensor())));
      value = list;
    } else if (value.isGenerator()) {
      TORCH_CHECK(false, "a generator of the host for numbers of the device in ", schema.name());
    } else if (value.isNone() && schema.arguments()[i].name() == "generator") {
      value = generator();
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    }
    arguments.push_back(value);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &arguments);
  for (auto& [t, same] : written) {
    if (t.sizes() != same.sizes()) resized(t, same.sizes(), std::nullopt);
    if (!same.is_alias_of(on_host(t)) || same.data_ptr() != on_host(t).data_ptr()) on_host(t).copy_(same);
  }
  auto back = [&](const Tensor& made) {
    for (auto& [t, same] : written)
      if (made.is_same(same)) return t;
    return on_device(made);
  };
  torch::jit::drop(*stack, n);
  for (c10::IValue& value : arguments) {
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(back(t));
      value = list;
    }
    stack->push_back(value);
  }
}

using Ints = c10::SymIntArrayRef;

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, Ints stride, Ints padding,
                   Ints dilation, bool transposed, Ints output_padding, c10::SymInt groups) {
  ++counts.launches;
  std::optional<Tensor> bias = b.has_value() && b->defined() ? std::optional<Tensor>(on_host(*b)) : std::nullopt;
  return on_device(at::convolution_symint(on_host(x), on_host(w), bias, stride, padding, dilation, transposed,
                                          output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& g, const Tensor& x, const Tensor& w, Ints stride,
                                                        Ints padding, Ints dilation, bool transposed,
                                                        Ints output_padding, c10::SymInt groups,
                                                        std::array<bool, 3> mask) {
  ++counts.launches;
  c10::SymInt channels = transposed ? w.sym_size(1) * groups : w.sym_size(0);
  auto [gx, gw, gb] =
      at::convolution_backward_symint(on_host(g), on_host(x), on_host(w), Ints(&channels, 1), stride, padding, dilation,
                                      transposed, output_padding, groups, mask);
  return {on_device(gx), on_device(gw), on_device(gb)};
}

// The cell of a GRU is one kernel on accelerators: Cho et al. (2014), with the reset after the product, as cuDNN's.
std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& hidden, const Tensor& state,
                                    const std::optional<Tensor>& input_bias, const std::optional<Tensor>& hidden_bias) {
  ++counts.launches;
  Tensor x = on_host(input), h = on_host(hidden), before = on_host(state);
  if (input_bias.has_value() && input_bias->defined()) x = x + on_host(*input_bias);
  if (hidden_bias.has_value() && hidden_bias->defined()) h = h + on_host(*hidden_bias);
  auto xs = x.chunk(3, 1), hs = h.chunk(3, 1);
  Tensor reset = (xs[0] + hs[0]).sigmoid(), update = (xs[1] + hs[1]).sigmoid();
  Tensor fresh = (xs[2] + reset * hs[2]).tanh();
  return {on_device(fresh + update * (before - fresh)), on_device(at::cat({reset, update, fresh, before, hs[2]}, 1))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad, const Tensor& workspace,
                                                                     bool has_bias) {
  ++counts.launches;
  Tensor g = on_host(grad);
  auto kept = on_host(workspace).chunk(5, 1);
  const Tensor &reset = kept[0], &update = kept[1], &fresh = kept[2], &before = kept[3], &hidden = kept[4];
  Tensor of_fresh = g * (1 - update) * (1 - fresh * fresh);
  Tensor of_update = g * (before - fresh) * (1 - update) * update;
  Tensor of_reset = of_fresh * hidden * (1 - reset) * reset;
  Tensor x = at::cat({of_reset, of_update, of_fresh}, 1), h = at::cat({of_reset, of_update, of_fresh * reset}, 1);
  Tensor none;
  return {on_device(x), on_device(h), on_device(g * update), has_bias ? on_device(x.sum(0)) : none,
          has_bias ? on_device(h.sum(0)) : none};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("resize_", resized);
  m.impl("_copy_from", copied);
  m.impl("_copy_from_and_resize", copy_and_resize);
  m.impl("_local_scalar_dense", scalar);
  m.impl("view", [](const Tensor& t, c10::IntArrayRef size) { return at::native::view(t, size); });
  m.impl("_reshape_alias", [](const Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride) {
    return at::native::_reshape_alias(t, size, stride);
  });
  m.impl("unfold", [](const Tensor& t, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(t, dim, size, step);
  });
  m.impl("set_.source_Storage_storage_offset",
         [](Tensor& t, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) -> Tensor& {
           return at::native::set_storage_cpu_(t, source, offset, size, stride);
         });
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY(simulated, m) {
  m.def("start() -> ()", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  m.def("counts() -> int[]", [] { return std::vector<int64_t>{counts.launches, counts.uploads, counts.reads}; });
  m.def("why() -> Dict(str, int)", [] {
    c10::Dict<std::string, int64_t> found;
    for (auto& [name, times] : counts.why) found.insert(name, times);
    return found;
  });
  m.def("clear() -> ()", [] { counts = Counts(); });
  m.def("forbid(bool yes) -> ()", [](bool yes) { forbidden = yes; });
  m.def("seed(int number) -> ()", [](int64_t number) { generator().set_current_seed(number); });
  m.def("random_state() -> Tensor", [] { return generator().get_state(); });
  m.def("set_random_state(Tensor state) -> ()", [](const Tensor& state) { generator().set_state(state); });
}

}  // namespace
