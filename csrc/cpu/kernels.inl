// The kernels in terms of Lanes. Included once per instruction set, inside its namespace, behind its lanes_*.inl.

/// Sum of the lanes, one fixed tree.
inline float sum_lanes(const Lanes& value) {
  float lane[16];
  store(lane, value);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

/// R x J dot products at once. Each owns one accumulator of 16 lanes, so that R and J do not change a result.
template <int R, int J, class T>
inline void dot_tile(const void* const* x, const T* a, int64_t a_stride, int64_t k, float* const* v, int32_t j0) {
  Lanes acc[R][J];
  const T* row[R];
  POLYLORA_UNROLL
  for (int r = 0; r < R; ++r) {
    row[r] = static_cast<const T*>(x[r]);
    POLYLORA_UNROLL
    for (int j = 0; j < J; ++j) acc[r][j] = zero();
  }
  const T* weight = a + j0 * a_stride;
  const auto step = [&](auto load_at) {
    Lanes values[R];
    POLYLORA_UNROLL
    for (int r = 0; r < R; ++r) values[r] = load_at(row[r]);
    POLYLORA_UNROLL
    for (int j = 0; j < J; ++j) {
      const Lanes factor = load_at(weight + j * a_stride);
      POLYLORA_UNROLL
      for (int r = 0; r < R; ++r) acc[r][j] = multiply_add(values[r], factor, acc[r][j]);
    }
  };
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) step([i](const T* from) { return load(from + i); });
  if (i < k) step([i, k](const T* from) { return load_part(from + i, static_cast<int>(k - i)); });
  POLYLORA_UNROLL
  for (int r = 0; r < R; ++r) {
    POLYLORA_UNROLL
    for (int j = 0; j < J; ++j) v[r][j0 + j] = sum_lanes(acc[r][j]);
  }
}

template <int R, int J, class T>
inline void dot_rows(const void* const* x, const T* a, int64_t a_stride, int32_t rank, int64_t k, float* const* v) {
  int32_t j = 0;
  for (; j + J <= rank; j += J) dot_tile<R, J>(x, a, a_stride, k, v, j);
  for (; j < rank; ++j) dot_tile<R, 1>(x, a, a_stride, k, v, j);
}

template <class T>
void dot(const void* const* x, int32_t rows, const void* a, int64_t a_stride, int32_t rank, int64_t k,
         float* const* v) {
  const T* weight = static_cast<const T*>(a);
  int32_t r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) dot_rows<kDotRows, kDotRanks>(x + r, weight, a_stride, rank, k, v + r);
  for (; r + 2 <= rows; r += 2) dot_rows<2, kDotRanks>(x + r, weight, a_stride, rank, k, v + r);
  for (; r < rows; ++r) dot_rows<1, kDotRanksOneRow>(x + r, weight, a_stride, rank, k, v + r);
}

/// R rows times C blocks of 16 outputs. Each output owns one lane: a chain over j.
template <int R, int C>
inline void product_tile(const float* vs, int32_t rank, const float* pack, float* acc) {
  Lanes sum[R][C];
  POLYLORA_UNROLL
  for (int r = 0; r < R; ++r) {
    POLYLORA_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = zero();
  }
  for (int32_t j = 0; j < rank; ++j) {
    Lanes weight[C];
    POLYLORA_UNROLL
    for (int c = 0; c < C; ++c) weight[c] = load(pack + j * kProductCols + c * 16);
    POLYLORA_UNROLL
    for (int r = 0; r < R; ++r) {
      const Lanes value = broadcast(vs[r * rank + j]);
      POLYLORA_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = multiply_add(value, weight[c], sum[r][c]);
    }
  }
  POLYLORA_UNROLL
  for (int r = 0; r < R; ++r) {
    POLYLORA_UNROLL
    for (int c = 0; c < C; ++c) store(acc + r * kProductCols + c * 16, sum[r][c]);
  }
}

template <int C>
inline void product_rows(const float* vs, int32_t rows, int32_t rank, const float* pack, float* acc) {
  int32_t r = 0;
  for (; r + kProductRows <= rows; r += kProductRows) {
    product_tile<kProductRows, C>(vs + r * rank, rank, pack, acc + r * kProductCols);
  }
  for (; r < rows; ++r) product_tile<1, C>(vs + r * rank, rank, pack, acc + r * kProductCols);
}

template <class T>
void product(const float* vs, int32_t rows, int32_t rank, const void* b, int64_t b_stride, int32_t cols, float* pack,
             float* acc) {
  // B as pack[j][n] in fp32, once for all rows.
  const T* weight = static_cast<const T*>(b);
  for (int32_t n = 0; n < cols; n += 16) {
    const int valid = cols - n < 16 ? cols - n : 16;
    int32_t j = 0;
    for (; j + 16 <= rank; j += 16) {
      transpose(weight + n * b_stride + j, b_stride, valid, 16, pack + j * kProductCols + n, kProductCols);
    }
    if (j < rank) {
      transpose(weight + n * b_stride + j, b_stride, valid, rank - j, pack + j * kProductCols + n, kProductCols);
    }
  }
  int32_t n = 0;
  for (; n + kProductBlocks * 16 <= cols; n += kProductBlocks * 16) {
    product_rows<kProductBlocks>(vs, rows, rank, pack + n, acc + n);
  }
  for (; n < cols; n += 16) product_rows<1>(vs, rows, rank, pack + n, acc + n);
}

template <class T>
void add_to(void* y, const float* acc, int32_t cols) {
  T* out = static_cast<T*>(y);
  int32_t n = 0;
  for (; n + 16 <= cols; n += 16) store(out + n, add(load(out + n), load(acc + n)));
  if (n < cols) store_part(out + n, add(load_part(out + n, cols - n), load_part(acc + n, cols - n)), cols - n);
}

template <class T>
void accumulate(float* sum, const void* y, float weight, const float* delta, int32_t cols) {
  const T* in = static_cast<const T*>(y);
  const Lanes factor = broadcast(weight);
  int32_t n = 0;
  for (; n + 16 <= cols; n += 16) {
    Lanes total = multiply_add(load(in + n), factor, load(sum + n));
    if (delta != nullptr) total = add(total, load(delta + n));
    store(sum + n, total);
  }
  if (n < cols) {
    Lanes total = multiply_add(load_part(in + n, cols - n), factor, load_part(sum + n, cols - n));
    if (delta != nullptr) total = add(total, load_part(delta + n, cols - n));
    store_part(sum + n, total, cols - n);
  }
}

template <class T>
void store_row(void* y, const float* value, int32_t cols) {
  T* out = static_cast<T*>(y);
  int32_t n = 0;
  for (; n + 16 <= cols; n += 16) store(out + n, load(value + n));
  if (n < cols) store_part(out + n, load_part(value + n, cols - n), cols - n);
}

/// out[n] = float(y[n]) + delta[n] for n in [0, cols), 0 for n in [cols, kProductCols).
template <class T>
inline void widen_and_add(float* out, const void* y, const float* delta, int32_t cols) {
  const T* in = static_cast<const T*>(y);
  const auto some = [cols](auto* from, int32_t n) {
    return cols - n >= 16 ? load(from + n) : load_part(from + n, std::max(0, cols - n));
  };
  for (int32_t n = 0; n < kProductCols; n += 16) {
    const Lanes value = some(in, n);
    store(out + n, delta == nullptr ? value : add(value, some(delta, n)));
  }
}

/// condition ? a : b in a form that no compiler makes a branch of.
inline float select(bool condition, float a, float b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

/// x within [low, high]; NaN stays NaN, as torch's clamp lets it.
inline float clamp(float x, float low, float high) {
  x = select(x < low, low, x);
  return select(x > high, high, x);
}

/// e^x without a branch or a call, so that loops over it become vectors. Within 2 units in the last place; NaN stays.
inline float exp_of(float x) {
  x = clamp(x, -110.0f, 90.0f);
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const int32_t n = static_cast<int32_t>(bits_of(shifted) - bits_of(kRound));
  const float whole = shifted - kRound;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * r + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * r * r + r + 1.0f;
  // 2^n in two steps: one alone may leave the range of the exponent.
  const int32_t half = n >> 1;
  const float low = float_of(static_cast<uint32_t>(half + 127) << 23);
  const float high = float_of(static_cast<uint32_t>(n - half + 127) << 23);
  return sum * low * high;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

/// g = act(g); u is for kSwigluOai alone. NaN stays NaN.
inline void apply(Activation act, float (&g)[kProductCols], const float (&u)[kProductCols], float alpha, float limit) {
  switch (act) {
    case Activation::kSilu:
      for (float& x : g) x = x / (1.0f + exp_of(-x));
      break;
    case Activation::kGelu:
      for (float& x : g) x = 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
      break;
    case Activation::kGeluTanh:  // (1 + tanh(z)) / 2 = sigmoid(2 z)
      for (float& x : g) x = x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
      break;
    case Activation::kRelu2:
      for (float& x : g) x = select(x < 0.0f, 0.0f, x * x);
      break;
    case Activation::kSwigluOai:
      for (int n = 0; n < kProductCols; ++n) {
        const float top = select(g[n] > limit, limit, g[n]);
        g[n] = top * sigmoid(alpha * top) * (clamp(u[n], -limit, limit) + 1.0f);
      }
      break;
  }
}

template <class T>
void activate(void* h, const void* gate, const float* gate_delta, const void* up, const float* up_delta, int32_t cols,
              Activation act, float alpha, float limit) {
  float g[kProductCols];
  float u[kProductCols] = {};
  widen_and_add<T>(g, gate, gate_delta, cols);
  if (up != nullptr) widen_and_add<T>(u, up, up_delta, cols);
  apply(act, g, u, alpha, limit);
  if (up != nullptr && act != Activation::kSwigluOai) {
    for (int n = 0; n < kProductCols; ++n) g[n] *= u[n];
  }
  store_row<T>(h, g, cols);
}

template <class T>
inline const Kernels* kernel_set() {
  static constexpr Kernels set = {dot<T>, product<T>, add_to<T>, accumulate<T>, activate<T>, store_row<T>, sizeof(T)};
  return &set;
}

inline const Kernels* kernels_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernel_set<BFloat16>();
    case DType::kFloat16:
      return kernel_set<Float16>();
    default:
      return kernel_set<float>();
  }
}
