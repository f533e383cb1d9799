// The inner loops of csrc/neighbor_attention.cpp for one instruction set. Included once for each, with
//
//   TILEDCORE_ISA      the namespace of this copy
//   TILEDCORE_TARGET   the attribute that lets the compiler use the instruction set
//   TILEDCORE_LANES    floats in a vector register
//   TILEDCORE_ROWS     queries per call of multiply(). ROWS x 2 sums, two vectors and one broadcast
//                      must fit the registers; otherwise the sums spill in the inner loop.
//
// Separate copies instead of target_clones, because the best block size differs, and because GCC
// lowers a vector type to the function's own target before it inlines: each function needs the target.

namespace tiledcore {
namespace {
namespace TILEDCORE_ISA {

constexpr int LANES = TILEDCORE_LANES;
constexpr int ROWS = TILEDCORE_ROWS;
constexpr int PANEL = 2 * LANES;
static_assert(KEYS % PANEL == 0, "a full block of keys is whole panels");
static_assert(QUERIES % ROWS == 0, "a full chunk of queries is whole groups of rows");

// Unaligned: this costs nothing on aligned addresses, and D may not be a multiple of LANES.
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

TILEDCORE_TARGET inline Vec splat(float value) { return value - Vec{}; }

// c[ROWS, V * LANES] = factor[row] * c + a[ROWS, depth] @ b[depth, V * LANES]; if `first`, without c.
template <int V, bool first>
TILEDCORE_TARGET inline void multiply(
    const float* __restrict a, int64_t a_row, const float* __restrict b, int64_t depth,
    float* __restrict c, int64_t c_row, const float* __restrict factor) {
  Vec sum[ROWS][V];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) {
      sum[r][i] = first ? Vec{} : *reinterpret_cast<Vec*>(c + r * c_row + i * LANES) * factor[r];
    }
  }
  for (int64_t k = 0; k < depth; ++k, b += V * LANES) {
    Vec column[V];
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) {
      column[i] = *reinterpret_cast<const Vec*>(b + i * LANES);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) {
        sum[r][i] += a[r * a_row + k] * column[i];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) {
      *reinterpret_cast<Vec*>(c + r * c_row + i * LANES) = sum[r][i];
    }
  }
}

// 2^x for x <= 0, with a relative error of 2e-7; 0 below 2^-126; NaN stays NaN.
TILEDCORE_TARGET inline Vec exp2_negative(Vec x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const Vec magic = splat(12582912.0f);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);  // -1/2 to 1/2
  // Taylor series of exp(f * ln 2); the truncation error is at most 1.2e-7.
  Vec y = splat(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  const Int power = (reinterpret_cast<Int>(shifted) + 127) << 23;
  const Vec result = y * reinterpret_cast<Vec>(power);
  return x < -126.0f ? Vec{} : result;
}

// Online softmax of one row's scores in a block: replaces scores by weights, updates the running
// maximum and sum, and returns the factor for earlier sums.
TILEDCORE_TARGET inline float softmax(
    float* __restrict scores, int64_t padded, float& highest, float& total) {
  Vec most = *reinterpret_cast<Vec*>(scores);
  for (int64_t j = LANES; j < padded; j += LANES) {
    const Vec next = *reinterpret_cast<Vec*>(scores + j);
    most = next > most ? next : most;
  }
  float top = highest;
  for (int i = 0; i < LANES; ++i) {
    top = most[i] > top ? most[i] : top;
  }
  const float factor = exp2_negative(splat(highest - top))[0];
  Vec sum{};
  for (int64_t j = 0; j < padded; j += LANES) {
    const Vec weight = exp2_negative(*reinterpret_cast<Vec*>(scores + j) - top);
    *reinterpret_cast<Vec*>(scores + j) = weight;
    sum += weight;
  }
  float added = 0;
  for (int i = 0; i < LANES; ++i) {
    added += sum[i];
  }
  highest = top;
  total = total * factor + added;
  return factor;
}

// Columns of the sums: panels of two vectors, then a single vector if that is enough.
constexpr int64_t padded_depth(int64_t D) { return (D + LANES - 1) / LANES * LANES; }

// Keys as panels [D, PANEL], values as panels [count, PANEL or LANES], widened to float32.
template <typename F>
TILEDCORE_TARGET inline void pack(const Problem& p, const Block& block, Scratch& s) {
  using Store = typename F::Store;
  const int64_t D = p.D, count = block.count;
  for (int64_t j = 0; j < count; ++j) {
    const Store* key = static_cast<const Store*>(block.k) + block.tokens[j] * block.k_token;
    float* to = s.keys + j / PANEL * PANEL * D + j % PANEL;
    for (int64_t d = 0; d < D; ++d) {
      to[d * PANEL] = F::widen(key[d]);
    }
  }
  // The padding of the last panel is masked by its score, but must not be NaN from old memory.
  for (int64_t j = count; j % PANEL; ++j) {
    float* to = s.keys + j / PANEL * PANEL * D + j % PANEL;
    for (int64_t d = 0; d < D; ++d) {
      to[d * PANEL] = 0;
    }
  }
  const int64_t depth = padded_depth(D);
  for (int64_t d = 0; d < depth; d += PANEL) {
    const int64_t width = std::min<int64_t>(PANEL, depth - d), real = std::min(width, D - d);
    float* to = s.values + d * count;
    for (int64_t j = 0; j < count; ++j, to += width) {
      const Store* value = static_cast<const Store*>(block.v) + block.tokens[j] * block.v_token + d;
      for (int64_t i = 0; i < real; ++i) {
        to[i] = F::widen(value[i]);
      }
      for (int64_t i = real; i < width; ++i) {
        to[i] = 0;
      }
    }
  }
}

// Attention of the chunk's queries to one packed block of keys, added to the running sums.
TILEDCORE_TARGET inline void attend_block(
    const Problem& p, const float* queries, int64_t rows, int64_t count, Scratch& s) {
  const int64_t D = p.D, depth = padded_depth(D), padded = (count + PANEL - 1) / PANEL * PANEL;
  for (int64_t row = 0; row < rows; row += ROWS) {
    float factor[ROWS];
    for (int64_t j = 0; j < padded; j += PANEL) {
      multiply<2, true>(queries + row * D, D, s.keys + j * D, D, s.scores + j, KEYS, factor);
    }
    for (int r = 0; r < ROWS; ++r) {
      float* scores = s.scores + r * KEYS;
      std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
      factor[r] = softmax(scores, padded, s.highest[row + r], s.total[row + r]);
    }
    float* sums = s.sums + row * depth;
    int64_t d = 0;
    for (; d + PANEL <= depth; d += PANEL) {
      multiply<2, false>(s.scores, KEYS, s.values + d * count, count, sums + d, depth, factor);
    }
    if (d < depth) {
      multiply<1, false>(s.scores, KEYS, s.values + d * count, count, sums + d, depth, factor);
    }
  }
}

template <typename F>
TILEDCORE_TARGET inline void load_queries(
    const Problem& p, const Strided& from, const Task& task, float* to) {
  using Store = typename F::Store;
  // The scale includes log2(e), so the softmax uses powers of 2.
  const float scale = static_cast<float>(p.scale * 1.4426950408889634);
  const Store* start = static_cast<const Store*>(from.data) + task.b * from.batch + task.h * from.head;
  for (int64_t i = 0; i < task.count; ++i) {
    const Store* query = start + task.query(p, i) * from.token;
    for (int64_t d = 0; d < p.D; ++d) {
      to[i * p.D + d] = scale * F::widen(query[d]);
    }
  }
  const int64_t rows = (task.count + ROWS - 1) / ROWS * ROWS;
  std::fill(to + task.count * p.D, to + rows * p.D, 0.0f);
}

template <typename F>
TILEDCORE_TARGET void attend(const Problem& p, const Task& task, Scratch& s) {
  using Store = typename F::Store;
  const int64_t depth = padded_depth(p.D), rows = (task.count + ROWS - 1) / ROWS * ROWS;
  load_queries<F>(p, p.q, task, s.queries);
  std::fill(s.sums, s.sums + rows * depth, 0.0f);
  std::fill(s.highest, s.highest + rows, -std::numeric_limits<float>::infinity());
  std::fill(s.total, s.total + rows, 0.0f);

  const auto start = [&](const Strided& from) {
    return static_cast<const Store*>(from.data) + task.b * from.batch + task.h * from.head;
  };
  int64_t tokens[KEYS];
  const int64_t seen = task.down.window * task.across.window;
  for (int64_t j = 0; j < seen; j += KEYS) {
    const int64_t count = std::min(KEYS, seen - j);
    for (int64_t i = 0; i < count; ++i) {
      tokens[i] = task.key(p, j + i);
    }
    pack<F>(p, Block{start(p.k), start(p.v), p.k.token, p.v.token, tokens, count}, s);
    attend_block(p, s.queries, rows, count, s);
  }
  if (p.G > 0 && p.global_q.data != nullptr) {
    load_queries<F>(p, p.global_q, task, s.queries);
  }
  for (int64_t j = 0; j < p.G; j += KEYS) {
    const int64_t count = std::min(KEYS, p.G - j);
    for (int64_t i = 0; i < count; ++i) {
      tokens[i] = j + i;
    }
    const Strided &k = p.global_k, &v = p.global_v;
    pack<F>(p, Block{start(k), start(v), k.token, v.token, tokens, count}, s);
    attend_block(p, s.queries, rows, count, s);
  }

  for (int64_t i = 0; i < task.count; ++i) {
    const float inverse = 1.0f / s.total[i];
    Store* to = static_cast<Store*>(p.out) +
        ((task.b * p.H * p.W + task.query(p, i)) * p.heads + task.h) * p.D;
    for (int64_t d = 0; d < p.D; ++d) {
      to[d] = F::narrow(s.sums[i * depth + d] * inverse);
    }
  }
}

}  // namespace TILEDCORE_ISA
}  // namespace
}  // namespace tiledcore

#undef TILEDCORE_ISA
#undef TILEDCORE_TARGET
#undef TILEDCORE_LANES
#undef TILEDCORE_ROWS
