// Writes the packed weight (packed_weight.h owns the layout).
#include "front_end.h"
#include "packed_weight.h"

#include <cstring>

namespace probquant {

int64_t packed_weight_bytes(const WeightShape& shape) {
  check_weight(shape);
  return PackedLayout(shape).bytes();
}

void pack_weight(const WeightShape& shape, const int8_t* weight, const float* weight_scale, const float* bias, const float* output_profile,
                 uint8_t* packed) {
  check_weight(shape);
  const PackedLayout layout(shape);
  std::memset(packed, 0, static_cast<size_t>(layout.bytes()));
  PackedTrailer trailer{{kInfinity, 0.0f}, 0.0f, 0.0f, shape, {}};
  const auto widen = [](float& largest, float x) { largest = is_finite(x) ? max_f(largest, std::fabs(x)) : kInfinity; };
  for (int64_t o = 0; o < layout.out_channels; ++o) {
    uint8_t* block = packed + layout.block_offset(o);
    const int64_t lane = layout.lane(o), first = layout.first_input(o);
    auto* segment_sums = reinterpret_cast<int32_t*>(block + layout.sums_offset) + lane;
    int32_t sum = 0;
    for (int64_t tap = 0; tap < layout.taps; ++tap)
      for (int64_t i = 0; i < layout.own_inputs; ++i) {
        const int8_t w = *weight++;
        require(w != -128, "weight: value -128 in output channel ", o, ", want [-127, 127]");
        sum += w;
        if (layout.segments > 1) segment_sums[tap / layout.segment_taps * kBlockChannels] += w;
        block[layout.weight_offset(lane, tap, first + i)] = static_cast<uint8_t>(w);
      }
    auto* header = reinterpret_cast<BlockHeader*>(block);
    header->weight_sum[lane] = sum;
    const float profile = output_profile ? output_profile[o] : 1.0f, inverse_profile = 1.0f / profile;
    require(profile >= kMinScale && inverse_profile >= kMinScale, "weight: output_profile of channel ", o, " is ", std::to_string(profile),
            ", want 2^-60 to 2^60");
    header->scale[lane] = weight_scale[o] * inverse_profile;
    header->bias[lane] = bias ? bias[o] * inverse_profile : 0.0f;
    header->profile[lane] = profile;
    header->inverse_profile[lane] = inverse_profile;
    trailer.profile = {min_f(trailer.profile.least_inverse, inverse_profile), max_f(trailer.profile.largest_inverse, inverse_profile)};
    widen(trailer.largest_scale, header->scale[lane]);
    widen(trailer.largest_bias, header->bias[lane]);
  }
  std::memcpy(packed + layout.trailer_offset(), &trailer, sizeof trailer);
}

}  // namespace probquant
