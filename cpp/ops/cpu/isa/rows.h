// Row-wise kernels: embedding, RMS norm, activation rounding and quantization, rotation, SiLU, argmax.
//
// Included inside the unnamed namespace of kernels_<isa>.cpp, after linear.h. Each row is computed in an order that
// does not depend on the other rows. Row lengths that are no multiple of 32 go through a padded copy.
#pragma once

// ---- embedding ----

template <Format kFormat>
inline void embed_row(const LinearSegment& table, int id, float* out) {
  const uint8_t* strip = strip_address(table, id / 16);
  const int part = id % 16 / kLanes, lane = id % kLanes;
  for (int begin = 0; begin < table.cols; begin += 32) {
    F w[32];
    unpack_group<kFormat>(strip, begin / 32, part, w);
    const int count = table.cols - begin < 32 ? table.cols - begin : 32;
    float lanes[kLanes];
    for (int k = 0; k < count; ++k) {
      f_store(lanes, w[k]);
      out[begin + k] = lanes[lane];
    }
  }
}

inline void embed(const EmbedArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  with_format(a.table.format, [&]<Format kFormat>() {
    for (int t = rows.begin; t < rows.end; ++t) embed_row<kFormat>(a.table, a.ids[t], a.out + t * a.out_stride);
  });
}

// ---- normalisation and activations ----

constexpr int kGroupVectors = 32 / kLanes;

/// 1 / sqrt(mean(x^2) + eps): per lane sums over columns ascending, folded, then the tail.
inline float inverse_rms(const float* x, int cols, float eps) {
  F sums[2] = {f_zero(), f_zero()};
  int i = 0;
  for (; i + 2 * kLanes <= cols; i += 2 * kLanes) {
    for (int j = 0; j < 2; ++j) {
      const F value = f_load(x + i + j * kLanes);
      sums[j] = muladd(value, value, sums[j]);
    }
  }
  float total = sum_lanes(sums[0] + sums[1]);
  for (; i < cols; ++i) total += x[i] * x[i];
  return 1.0f / sqrtf(total / static_cast<float>(cols) + eps);
}

/// Loads the 32 columns of a group, normalised if `weight` is not null; columns beyond `cols` are zero.
inline void load_group(const float* x, const float* weight, float inverse, int begin, int cols, F* v) {
  float padded[32], padded_weight[32];
  const float* source = x + begin;
  const float* scale = weight != nullptr ? weight + begin : nullptr;
  if (begin + 32 > cols) {
    for (int i = 0; i < 32; ++i) {
      padded[i] = begin + i < cols ? source[i] : 0.0f;
      padded_weight[i] = scale != nullptr && begin + i < cols ? scale[i] : 0.0f;
    }
    source = padded;
    if (scale != nullptr) scale = padded_weight;
  }
  for (int j = 0; j < kGroupVectors; ++j) {
    v[j] = f_load(source + j * kLanes);
    if (scale != nullptr) v[j] = v[j] * f_set1(inverse) * f_load(scale + j * kLanes);
  }
}

/// Rounds to bf16, nearest even; values are finite.
inline F round_bf16(F value) {
  const I bits = float_to_bits(value);
  const I odd = shift_right<16>(bits) & i_set1(1);
  return bits_to_float((bits + i_set1(0x7fff) + odd) & i_set1(static_cast<int32_t>(0xffff0000u)));
}

/// Stores one group of 32 columns of row t in the form `out` asks for.
inline void store_group(const F* v, const Activation& out, int t, int group) {
  const int64_t index = group_index(out, t, group);
  if (out.type != ActType::int8) {
    float* values = out.values + index * 32;
    F sum = f_zero();
    for (int j = 0; j < kGroupVectors; ++j) {
      const F value = out.type == ActType::bf16 ? round_bf16(v[j]) : v[j];
      f_store(values + j * kLanes, value);
      sum = sum + value;
    }
    if (kBf16Dot && out.type == ActType::bf16) {
      pack_bf16(values, 32, out.packed + index * 32);
      out.shifts[index] = sum_lanes(sum);
    }
    return;
  }
  F largest = f_abs(v[0]);
  for (int j = 1; j < kGroupVectors; ++j) largest = f_max(largest, f_abs(v[j]));
  const float peak = max_lanes(largest);
  const F inverse = f_set1(peak > 0.0f ? 127.0f / peak : 0.0f);
  int8_t* codes = out.codes + index * 32;
  for (int j = 0; j < kGroupVectors; ++j) store_low_bytes(codes + j * kLanes, round_to_int(v[j] * inverse));
  const int32_t half_sum = sum_16_bytes(codes), sum = half_sum + sum_16_bytes(codes + 16);
  out.scales[index] = peak / 127.0f;
  out.shifts[index] = out.scales[index] * static_cast<float>(sum);
  out.minus_sums[index] = -sum;
  out.minus_half_sums[index] = -half_sum;
}

/// Row `x` of `cols` columns becomes row t of `out`; normalised if `weight` is not null.
inline void prepare_row(const float* x, int cols, const float* weight, float eps, const Activation& out, int t) {
  const float inverse = weight != nullptr ? inverse_rms(x, cols, eps) : 1.0f;
  for (int group = 0; group < out.cols / 32; ++group) {
    F v[kGroupVectors];
    load_group(x, weight, inverse, 32 * group, cols, v);
    store_group(v, out, t, group);
  }
}

inline void prepare(const PrepareArgs& a, const Part& part) {
  const Range rows = share(a.out.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) prepare_row(a.x + t * a.x_stride, a.cols, nullptr, 0.0f, a.out, t);
}

inline void rms_norm_row(const float* x, const float* weight, float eps, int cols, float* out) {
  const float inverse = inverse_rms(x, cols, eps);
  for (int i = 0; i < cols; ++i) out[i] = x[i] * inverse * weight[i];
}

inline void rms_norm(const RmsNormArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    rms_norm_row(a.x + t * a.x_stride, a.weight, a.eps, a.cols, a.out + t * a.out_stride);
  }
}

// ---- rotation ----

/// out = factor * R(position) x; out may be x.
inline void rotate(const float* x, const RopeTable& table, int position, float factor, float* out) {
  const int half = table.head_dim / 2;
  const float* cos = table.cos_sin + static_cast<int64_t>(position) * table.head_dim;
  const float* sin = cos + half;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = (a * cos[i] - b * sin[i]) * factor;
    out[i + half] = (b * cos[i] + a * sin[i]) * factor;
  }
}

inline void rope(const RopeArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    for (int h = 0; h < a.num_heads; ++h) {
      float* head = a.x + t * a.x_stride + h * a.table.head_dim;
      rotate(head, a.table, a.positions[t], 1.0f, head);
    }
  }
}

// ---- SiLU and argmax ----

/// x / (1 + e^-x) * up.
inline F silu_mul(F gate, F up) {
  const F power = f_min(f_max(gate * f_set1(-1.44269504f), f_set1(-126.0f)), f_set1(126.0f));
  return gate / (f_set1(1.0f) + exp2(power)) * up;
}

inline void silu_mul(const SiluMulArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    const float* gate = a.gate + t * a.gate_stride;
    const float* up = a.up + t * a.up_stride;
    float* out = a.out + t * a.out_stride;
    int i = 0;
    for (; i + kLanes <= a.cols; i += kLanes) f_store(out + i, silu_mul(f_load(gate + i), f_load(up + i)));
    if (i < a.cols) {
      float gate_tail[kLanes] = {}, up_tail[kLanes] = {}, out_tail[kLanes];
      for (int j = i; j < a.cols; ++j) gate_tail[j - i] = gate[j], up_tail[j - i] = up[j];
      f_store(out_tail, silu_mul(f_load(gate_tail), f_load(up_tail)));
      for (int j = i; j < a.cols; ++j) out[j] = out_tail[j - i];
    }
  }
}

struct Best {
  float value;
  int32_t id;
};

/// Continues an argmax over `count` values whose ids start at `first_id`; a NaN never wins, ties keep the lower id.
inline void update_best(Best& best, const float* x, int count, int first_id) {
  for (int i = 0; i < count; ++i) {
    if (x[i] > best.value) best = {x[i], first_id + i};
  }
}

inline void argmax(const ArgmaxArgs& a, const Part& part) {
  const Range rows = share(a.rows, part);
  for (int t = rows.begin; t < rows.end; ++t) {
    Best best = {-__builtin_inff(), 0};
    update_best(best, a.x + t * a.x_stride, a.cols, 0);
    a.out[t] = best.id;
  }
}
