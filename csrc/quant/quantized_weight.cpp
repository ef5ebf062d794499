#include "quant/quantized_weight.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <initializer_list>

namespace lora_ext {
namespace {

constexpr at::ScalarType kFloatsOfQuant[kQuantFloats] = {at::kFloat, at::kHalf, at::kBFloat16};
constexpr int64_t kMaxValues = int64_t{1} << 62;

bool has(const QuantizedWeight& weight, QuantPart part) {
  return (weight.layout[kQuantParts] & part) != 0;
}

QuantFloat float_of(at::ScalarType dtype) {
  return dtype == at::kFloat  ? QuantFloat::F32
         : dtype == at::kHalf ? QuantFloat::F16
                              : QuantFloat::BF16;
}

void check_range(const char* op, const char* field, int64_t value, int64_t least, int64_t most) {
  TORCH_CHECK_VALUE(value >= least && value <= most, op, ": weight: ", field, ": got ", value,
                    ", expected ", least, " to ", most);
}

void check_layout(const char* op, const QuantizedWeight& weight) {
  TORCH_CHECK_VALUE(
      weight.layout.size() == kQuantLayout && weight.numbers.size() == kQuantNumbers, op,
      ": weight: got a layout of ", weight.layout.size(), " and ", weight.numbers.size(),
      " numbers, expected ", int{kQuantLayout}, " and ", int{kQuantNumbers},
      "; call lora_ext.quant.lora_linear_quantized, which makes both of a QuantizedWeight");
  const auto at = [&](QuantLayout place) { return weight.layout[place]; };
  check_range(op, "rows", at(kQuantN), 1, kMaxValues);
  check_range(op, "columns", at(kQuantK), 1, kMaxValues / at(kQuantN));
  check_range(op, "packing", at(kQuantPacking), 0, kQuantPackings - 1);
  check_range(op, "block_size", at(kQuantBlockSize), 1, kMaxValues);
  check_range(op, "rounding", at(kQuantRounding), 0, kQuantFloats - 1);
  check_range(op, "parts", at(kQuantParts), 0, kAllQuantParts);
  if (has(weight, kNestedScales)) {
    check_range(op, "scales.block_size", at(kQuantScalesBlock), 1, kMaxValues);
  }
  if (has(weight, kNestedShift)) {
    check_range(op, "shift.block_size", at(kQuantShiftBlock), 1, kMaxValues);
  }
}

void check_flat(const char* op, const char* field, const Tensor& tensor, int64_t numel,
                std::initializer_list<at::ScalarType> dtypes, const Tensor& x) {
  TORCH_CHECK_TYPE(std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end(),
                   op, ": weight: ", field, ": got dtype ", dtype_name(tensor.scalar_type()),
                   ", expected ", dtype_name(*dtypes.begin()));
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided && tensor.dim() == 1 &&
                        tensor.sym_size(0) == numel && (numel < 2 || tensor.sym_stride(0) == 1),
                    op, ": weight: ", field, ": got shape ", tensor.sym_sizes(),
                    ", expected a contiguous tensor [", numel, "]");
  TORCH_CHECK(tensor.device() == x.device(), op, ": weight: got device ", tensor.device(),
              ", expected ", x.device(), ", where the input is; move one of them with .to()");
}

}  // namespace

std::pair<int64_t, int64_t> checked_shape(const char* op, const QuantizedWeight& weight) {
  check_layout(op, weight);
  return {weight.layout[kQuantN], weight.layout[kQuantK]};
}

QuantizedFields checked_fields(const char* op, const QuantizedWeight& weight, const Tensor& x) {
  check_layout(op, weight);
  QuantizedFields fields{};
  fields.N = weight.layout[kQuantN], fields.K = weight.layout[kQuantK];
  // A block has no more values than there are.
  fields.block_size = std::min(weight.layout[kQuantBlockSize], fields.N * fields.K);
  fields.packing = static_cast<QuantPacking>(weight.layout[kQuantPacking]);
  fields.rounding = static_cast<QuantFloat>(weight.layout[kQuantRounding]);
  if (has(weight, kHasFactor)) fields.factor = weight.numbers[kQuantFactor];

  size_t place = 0;
  const auto next = [&](const char* field, int64_t numel,
                        std::initializer_list<at::ScalarType> dtypes) {
    TORCH_CHECK_VALUE(place < weight.tensors.size(), op, ": weight: ", field, ": got none among ",
                      weight.tensors.size(), " tensors, expected one of ", numel, " elements");
    const Tensor& tensor = weight.tensors[place++];
    check_flat(op, field, tensor, numel, dtypes, x);
    return tensor;
  };
  const QuantUnit& unit = unit_of(fields.packing);
  const int64_t values = fields.N * fields.K, blocks = fields.blocks();
  TORCH_CHECK_VALUE(unit.may_split || values % unit.codes == 0, op, ": weight: got ", fields.N,
                    " * ", fields.K, " values, expected a multiple of ", unit.codes);
  const bool numbers = fields.packing == QuantPacking::Int8;
  TORCH_CHECK_VALUE(numbers != has(weight, kHasCodebook), op, ": weight: codebook: got ",
                    numbers ? "one beside numbers of 8 bits" : "none",
                    ", expected one where codes are no numbers");
  fields.codes = next("codes", ((values - 1) / unit.codes + 1) * unit.bytes,
                      {numbers ? at::kChar : at::kByte});
  if (!numbers) fields.codebook = next("codebook", int64_t{1} << unit.bits, {at::kFloat});
  const auto per_block = [&](const char* name, QuantPart nested, QuantPart offset,
                             QuantLayout block_size, QuantNumber number) {
    BlockTensors found;
    int64_t count = blocks;
    if (has(weight, nested)) {
      found.codes = next(name, blocks, {at::kByte});
      found.codebook = next(name, 256, {at::kFloat});
      found.block_size = std::min(weight.layout[block_size], blocks);
      if (has(weight, offset)) found.offset = weight.numbers[number];
      count = (blocks - 1) / found.block_size + 1;
    }
    found.values = next(name, count, {at::kFloat, at::kHalf, at::kBFloat16});
    return found;
  };
  fields.scales =
      per_block("scales", kNestedScales, kScalesOffset, kQuantScalesBlock, kQuantScalesOffset);
  if (has(weight, kHasZeroPoint)) fields.zero_point = next("zero_point", blocks, {at::kChar});
  if (has(weight, kHasShift)) {
    fields.shift =
        per_block("shift", kNestedShift, kShiftOffset, kQuantShiftBlock, kQuantShiftOffset);
  }
  TORCH_CHECK_VALUE(place == weight.tensors.size(), op, ": weight: got ", weight.tensors.size(),
                    " tensors, expected ", place);
  return fields;
}

QuantizedMatrix matrix_of(const QuantizedFields& fields) {
  const auto numbers = [](const BlockTensors& tensors) {
    BlockNumbers found{};
    if (!tensors.values.defined()) return found;
    found.values = tensors.values.const_data_ptr();
    found.type = float_of(tensors.values.scalar_type());
    found.codes = data_or_null<uint8_t>(tensors.codes);
    found.codebook = data_or_null<float>(tensors.codebook);
    found.block_size = tensors.block_size;
    found.has_offset = tensors.offset.has_value();
    found.offset = static_cast<float>(tensors.offset.value_or(0));
    return found;
  };
  return {fields.N,
          fields.K,
          data_or_null<uint8_t>(fields.codes),
          data_or_null<float>(fields.codebook),
          fields.packing,
          fields.block_size,
          numbers(fields.scales),
          numbers(fields.shift),
          data_or_null<int8_t>(fields.zero_point),
          static_cast<float>(fields.factor.value_or(1)),
          fields.rounding};
}

namespace {

// Codes of whole units, [units * codes of one]
Tensor unpacked(const Tensor& data, QuantPacking packing) {
  const QuantUnit& unit = unit_of(packing);
  const auto low = [](const Tensor& bytes) { return bytes.bitwise_and(15); };
  const auto high = [](const Tensor& bytes) { return bytes.bitwise_right_shift(4); };
  switch (packing) {
    case QuantPacking::Int8:
      return data;
    case QuantPacking::HighFirst:
      return at::stack({high(data), low(data)}, 1).view(-1);
    case QuantPacking::LowFirst:
      return at::stack({low(data), high(data)}, 1).view(-1);
    case QuantPacking::Halves16:
    case QuantPacking::Halves32: {
      const Tensor units = data.view({-1, 1, unit.bytes});
      return at::cat({low(units), high(units)}, 1).view(-1);
    }
    case QuantPacking::Q6K:
      break;
  }
  // The low four bits of 256 codes in 128 bytes, the high two in 64. Of each half of the codes they
  // are the low nibbles of 64 bytes, then the high ones; and the four pairs of bits of 32 bytes.
  const Tensor units = data.view({-1, unit.bytes});
  const Tensor of_low = units.narrow(1, 0, 128).reshape({-1, 2, 1, 64});
  const Tensor of_high = units.narrow(1, 128, 64).reshape({-1, 2, 1, 32});
  TensorVector pairs;
  for (const int64_t shift : {0, 2, 4, 6}) {
    pairs.push_back(of_high.bitwise_right_shift(shift).bitwise_and(3));
  }
  const Tensor four = at::cat({low(of_low), high(of_low)}, 2).view({-1, 2, 4, 32});
  return four.bitwise_or(at::cat(pairs, 2).bitwise_left_shift(4)).view(-1);
}

// float, one for each block
Tensor numbers_of(const BlockTensors& tensors) {
  if (!tensors.codes.defined()) return tensors.values.to(at::kFloat);
  const int64_t blocks = tensors.codes.numel();
  const Tensor repeated = tensors.values.to(at::kFloat)
                              .unsqueeze(1)
                              .expand({-1, tensors.block_size})
                              .reshape(-1)
                              .narrow(0, 0, blocks);
  const Tensor numbers = tensors.codebook.index_select(0, tensors.codes.to(at::kInt)) * repeated;
  return tensors.offset.has_value() ? numbers + *tensors.offset : numbers;
}

}  // namespace

Tensor dequantized(const QuantizedFields& fields, at::ScalarType dtype) {
  const int64_t values = fields.N * fields.K, blocks = fields.blocks();
  const Tensor codes = unpacked(fields.codes, fields.packing).narrow(0, 0, values);
  Tensor flat = fields.codebook.defined() ? fields.codebook.index_select(0, codes.to(at::kInt))
                                          : codes.to(at::kFloat);
  // As [blocks, block_size], the last block filled up.
  const int64_t rest = blocks * fields.block_size - values;
  if (rest > 0) flat = at::constant_pad_nd(flat, {0, rest});
  Tensor rows = flat.view({blocks, fields.block_size});
  if (fields.zero_point.defined()) rows = rows - fields.zero_point.to(at::kFloat).unsqueeze(1);
  rows = rows * numbers_of(fields.scales).unsqueeze(1);
  if (fields.factor.has_value()) rows = rows * *fields.factor;
  if (fields.shift.values.defined()) rows = rows + numbers_of(fields.shift).unsqueeze(1);
  rows = rows.to(kFloatsOfQuant[static_cast<int>(fields.rounding)]).to(dtype);
  return rows.view(-1).narrow(0, 0, values).view({fields.N, fields.K});
}

}  // namespace lora_ext
