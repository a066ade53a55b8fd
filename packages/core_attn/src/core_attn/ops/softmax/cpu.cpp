// Exact and windowed softmax attention on the CPU, forward and backward, in tiles on the small matmul `brgemm` of
// libtorch. Built on first use by cpu.py, which also says when it may run; nothing here depends on Python.
//
// The tiles are those of "FlashAttention" (S66): the forward keeps the log-sum-exp of a row, the backward computes the
// weights again from it. Shapes: B batch, H query heads, G key heads, L queries, M keys, D channels of a head, Dv
// channels of a value.
//
// Forward, for a tile of queries:   S = Q Kᵀ,  P = 2^(c S - base),  O += P V
// Backward, for a tile of keys:     Sᵀ = K Qᵀ,  dPᵀ = V dOᵀ,  dV += Pᵀ dO,  dK += dSᵀ Q,  dQᵀ += Kᵀ dSᵀ
// The backward works on transposed scores, so that P and dS are left operands as they come out of the elementwise part
// and the statistics of the queries are vectors rather than broadcast numbers.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <string>
#include <utility>

namespace {

using at::BFloat16;
using at::native::cpublas::brgemm;
using at::native::cpublas::brgemm_release;
using at::native::cpublas::could_pack;

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float INF = std::numeric_limits<float>::infinity();

// A row whose scores are surely below this in absolute value, in units of log 2, needs no running maximum: 2^58 summed
// over any number of keys is far from overflow, and 2^-58 far from underflow. |q·k| <= |q| |k| tells; only of keys that
// the row reads, so that the others do not even change a rounding.
constexpr float SAFE = 58.0f;

struct Tensor4 {
  void* data;
  int64_t batch, head, row;  // strides in elements; channels lie side by side
};

struct Call {  // cpu.py holds the same structure
  Tensor4 q, k, v, out, dout, dq, dk, dv;
  float* lse;           // (B, H, L), +inf where a row has no keys
  const uint8_t* keep;  // (B, M), or null
  int64_t batch, heads, groups, queries, keys, width, value_width;
  int64_t left, right;  // keys read before and after a query's own position
  float scale;
  int32_t bfloat16;
};

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
struct Buffer {
  explicit Buffer(int64_t n) : data(static_cast<T*>(std::aligned_alloc(64, up(std::max<int64_t>(n, 1) * sizeof(T), 64)))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) const { return data[i]; }
  T* data;
};

// ---- sixteen numbers at a time ----

__m512 load(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }

void store(float* to, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, x); }

#ifdef __AVX512BF16__
__m512 load(const BFloat16* from, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

void store(BFloat16* to, __m512 x, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(to, lanes, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
#endif

__mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }

// The lanes of the sixteen columns from c that lie in [lo, hi).
__mmask16 between(int64_t lo, int64_t hi, int64_t c) { return first(hi - c) & ~first(lo - c); }

// 2^x = 2^floor(x) · polynomial of the rest, minimax in relative error: 8e-5 with degree 3, 8e-8 with degree 5.
template <int degree>
inline __m512 exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p;
  if constexpr (degree == 3) {
    p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.07802452222f), _mm512_set1_ps(0.2260671711f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.6958335266f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.9999252208f));
  } else {
    p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.00187757667f), _mm512_set1_ps(0.00898934034f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.05582631759f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.2401536173f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.6931530731f));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.9999999251f));
  }
  return _mm512_scalef_ps(p, x);
}

// ---- what the operands of a matmul look like ----
//
// A left operand is row major. A right operand is row major too, but for bfloat16 its rows are interleaved two by two
// (VNNI). Where numbers are split into pieces, a left operand has the pieces side by side and a right operand has them
// one below the other, largest first.
//
// `row` stores 32 numbers of a row of a left operand and returns sixteen sums of two of them, as they were rounded: weights
// that are divided by the sum of what was multiplied add up to 1 exactly. `pair` stores sixteen columns of two rows of a
// right operand.
//
// libtorch generates code for each size of matmul, and going from one size to another takes as long as a small matmul
// does. So whoever calls `multiply` does many of one size before any of another. The numbers of queries and keys of a
// forward tile are such that its scores stay in the first-level cache, the numbers of tiles such that what is multiplied
// in a row stays in the second-level one.

struct Plain {  // float32 as it is
  using In = float;
  using Element = float;
  static constexpr int pieces = 1, degree = 5;
  static constexpr int64_t queries = 64, keys = 128, query_tiles = 2, key_tiles = 8, backward_tiles = 8;

  static void begin() {}
  static void end() {}

  static inline __m512 row(float* to, int64_t, __m512 a, __m512 b) {
    _mm512_store_ps(to, a);
    _mm512_store_ps(to + 16, b);
    return _mm512_add_ps(a, b);
  }
  static inline void pair(float* to, int64_t r, int64_t c, int64_t, int64_t columns, __m512 a, __m512 b) {
    _mm512_store_ps(to + r * columns + c, a);
    _mm512_store_ps(to + (r + 1) * columns + c, b);
  }
  static void multiply(
      int64_t rows, int64_t columns, int64_t inner, const float* a, const float* b, float* c, bool add) {
    brgemm(rows, columns, inner, inner, columns, columns, add, a, b, c, false);
  }
};

#ifdef __AVX512BF16__

inline __m512i join(__m512 a, __m512 b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }

inline __m512i interleave(__m512 a, __m512 b) {
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16,
      0);
  return _mm512_permutexvar_epi16(order, join(a, b));
}

struct Half {  // bfloat16
  using In = BFloat16;
  using Element = BFloat16;
  static constexpr int pieces = 1, degree = 3;
  static constexpr int64_t queries = 64, keys = 128, query_tiles = 2, key_tiles = 8, backward_tiles = 8;

  static void begin() {}
  static void end() { brgemm_release(true); }

  static inline __m512 row(BFloat16* to, int64_t, __m512 a, __m512 b) {
    const __m512i rounded = join(a, b);
    _mm512_store_si512(to, rounded);
    return _mm512_dpbf16_ps(
        _mm512_setzero_ps(), reinterpret_cast<__m512bh>(rounded), reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80)));
  }
  static inline void pair(BFloat16* to, int64_t r, int64_t c, int64_t, int64_t columns, __m512 a, __m512 b) {
    _mm512_store_si512(to + r * columns + 2 * c, interleave(a, b));
  }
  static void multiply(
      int64_t rows, int64_t columns, int64_t inner, const BFloat16* a, const BFloat16* b, float* c, bool add) {
    brgemm(rows, columns, inner, inner, columns, columns, add, a, b, c, true);
  }
};

#endif
#ifdef __AMX_BF16__

// float32 as the sum of three bfloat16 numbers of 8 bits each, which is all of its 24: high + middle + low. Of the nine
// products of two such sums, the three that are 2^-24 and less of the largest are left out. The tile unit (AMX)
// multiplies bfloat16 more than six times as fast as the vector unit multiplies float32, so that this is faster at the
// same accuracy. What makes it so is that a piece, once in a tile register, is used in all its products, which libtorch's
// matmul cannot do; so the tiles are multiplied here.
struct Split {
  using In = float;
  using Element = BFloat16;
  static constexpr int pieces = 3, degree = 5;
  static constexpr int64_t queries = 32, keys = 64, query_tiles = 4, key_tiles = 1, backward_tiles = 2;

  static inline __m512 top(__m512 x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff0000)));
  }
  static inline __m512 row(BFloat16* to, int64_t columns, __m512 a, __m512 b) {
    const __m512 sum = _mm512_add_ps(a, b);
    for (int piece = 0; piece < 2; ++piece, to += columns) {
      const __m512 x = top(a), y = top(b);
      _mm512_store_si512(to, join(x, y));
      a = _mm512_sub_ps(a, x);
      b = _mm512_sub_ps(b, y);
    }
    _mm512_store_si512(to, join(a, b));
    return sum;
  }
  // In panels of 32 columns, so that what a tile register takes lies together.
  static inline void pair(BFloat16* to, int64_t r, int64_t c, int64_t rows, int64_t columns, __m512 a, __m512 b) {
    to += c / 32 * rows * 32 + r * 32 + c % 32 * 2;
    for (int piece = 0; piece < 2; ++piece, to += rows * columns) {
      const __m512 x = top(a), y = top(b);
      _mm512_store_si512(to, interleave(x, y));
      a = _mm512_sub_ps(a, x);
      b = _mm512_sub_ps(b, y);
    }
    _mm512_store_si512(to, interleave(a, b));
  }

  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    _tile_loadconfig(&layout);
  }
  static void end() { _tile_release(); }

// Tile registers: 0 to 3 hold 32 x 32 sums, 4 and 5 hold 32 rows of the left operand, 6 and 7 32 columns of the right.
#define SUMS(move)                           \
  move(0, to, columns * 4);                  \
  move(1, to + 16, columns * 4);             \
  move(2, to + 16 * columns, columns * 4);   \
  move(3, to + 16 * columns + 16, columns * 4)
#define LEFT(piece)                                        \
  _tile_loadd(4, left + (piece) * inner, lda * 2);         \
  _tile_loadd(5, left + (piece) * inner + 16 * lda, lda * 2)
#define RIGHT(piece)                                         \
  _tile_loadd(6, right + (piece) * inner * columns, 128);    \
  _tile_loadd(7, right + (piece) * inner * columns + 32, 128)
#define PRODUCT             \
  _tile_dpbf16ps(0, 4, 6);  \
  _tile_dpbf16ps(1, 4, 7);  \
  _tile_dpbf16ps(2, 5, 6);  \
  _tile_dpbf16ps(3, 5, 7)

  static void multiply(
      int64_t rows, int64_t columns, int64_t inner, const BFloat16* a, const BFloat16* b, float* c, bool add) {
    const int64_t lda = pieces * inner;
    // The compiler does not know what tile instructions read and write.
    asm volatile("" ::: "memory");
    for (int64_t j = 0; j < columns; j += 32)
      for (int64_t i = 0; i < rows; i += 32) {
        float* to = c + i * columns + j;
        if (add) {
          SUMS(_tile_loadd);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t k = 0; k < inner; k += 32) {
          const BFloat16 *left = a + i * lda + k, *right = b + j * inner + k * 32;
          LEFT(0);
          RIGHT(2);
          PRODUCT;
          RIGHT(1);
          PRODUCT;
          LEFT(1);
          PRODUCT;
          RIGHT(0);
          PRODUCT;
          LEFT(2);
          PRODUCT;
          LEFT(0);
          PRODUCT;
        }
        SUMS(_tile_stored);
      }
    asm volatile("" ::: "memory");
  }

#undef SUMS
#undef LEFT
#undef RIGHT
#undef PRODUCT
};

#endif

// ---- tiles of float32, and operands made of them ----

// (rows, columns) of `from`, zeros up to (rows_padded, columns_padded).
template <class In>
void take(
    float* tile, int64_t rows_padded, int64_t columns_padded, const In* from, int64_t stride, int64_t rows,
    int64_t columns) {
  for (int64_t r = 0; r < rows_padded; ++r)
    for (int64_t c = 0; c < columns_padded; c += 16) {
      const __m512 x = r < rows ? load(from + r * stride + c, first(columns - c)) : _mm512_setzero_ps();
      _mm512_store_ps(tile + r * columns_padded + c, x);
    }
}

template <class Out>
void give(
    Out* to, int64_t stride, const float* tile, int64_t columns_padded, int64_t rows, int64_t columns, float factor) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 16)
      store(
          to + r * stride + c,
          _mm512_mul_ps(_mm512_load_ps(tile + r * columns_padded + c), _mm512_set1_ps(factor)),
          first(columns - c));
}

void transpose16(const float* from, int64_t stride_from, float* to, int64_t stride_to) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(from + i * stride_from);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  for (int i = 0; i < 4; ++i) {
    const __m512 x = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), y = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    const __m512 z = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    const __m512 w = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    _mm512_store_ps(to + i * stride_to, _mm512_shuffle_f32x4(x, z, 0x88));
    _mm512_store_ps(to + (i + 4) * stride_to, _mm512_shuffle_f32x4(y, w, 0x88));
    _mm512_store_ps(to + (i + 8) * stride_to, _mm512_shuffle_f32x4(x, z, 0xdd));
    _mm512_store_ps(to + (i + 12) * stride_to, _mm512_shuffle_f32x4(y, w, 0xdd));
  }
}

void transpose(float* to, const float* tile, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16) transpose16(tile + r * columns + c, columns, to + c * rows + r, rows);
}

template <class Mode>
void as_left(typename Mode::Element* to, const float* tile, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 32) {
      const float* x = tile + r * columns + c;
      Mode::row(to + r * Mode::pieces * columns + c, columns, _mm512_load_ps(x), _mm512_load_ps(x + 16));
    }
}

template <class Mode>
void as_right(typename Mode::Element* to, const float* tile, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < columns; c += 16) {
      const float* x = tile + r * columns + c;
      Mode::pair(to, r, c, rows, columns, _mm512_load_ps(x), _mm512_load_ps(x + columns));
    }
}

void norms(const float* tile, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < columns; c += 16) {
      const __m512 x = _mm512_load_ps(tile + r * columns + c);
      sum = _mm512_fmadd_ps(x, x, sum);
    }
    to[r] = std::sqrt(_mm512_reduce_add_ps(sum));
  }
}

template <class T>
T* at_row(const Tensor4& t, int64_t b, int64_t h, int64_t r) {
  return static_cast<T*>(t.data) + b * t.batch + h * t.head + r * t.row;
}

// Which keys of a block are padding: bits of sixteen keys, and whether a block holds none, some or all that count.
struct Keep {
  Keep(const Call& c, int64_t size)
      : blocks(up(c.keys, size) / size), words(size / 16), bits(c.batch * blocks * words), state(c.batch * blocks) {
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t n = 0; n < blocks; ++n) {
        int64_t kept = 0;
        for (int64_t w = 0; w < words; ++w) {
          unsigned found = 0;
          for (int64_t i = 0; i < 16; ++i) {
            const int64_t key = n * size + w * 16 + i;
            found |= static_cast<unsigned>(key < c.keys && (c.keep == nullptr || c.keep[b * c.keys + key])) << i;
          }
          bits[(b * blocks + n) * words + w] = static_cast<__mmask16>(found);
          kept += __builtin_popcount(found);
        }
        state[b * blocks + n] = kept == 0 ? 0 : kept < size ? 1 : 2;
      }
  }
  int64_t blocks, words;
  Buffer<__mmask16> bits;
  Buffer<uint8_t> state;
};

// ---- forward ----

template <class Mode>
struct Forward {
  using Element = typename Mode::Element;
  using In = typename Mode::In;
  static constexpr int64_t Q = Mode::queries, K = Mode::keys;
  static constexpr int64_t QUERY_TILES = Mode::query_tiles, KEY_TILES = Mode::key_tiles;

  explicit Forward(const Call& call)
      : c(call),
        width(up(c.width, 32)),
        value_width(up(c.value_width, 32)),
        offset(c.keys - c.queries),
        factor(c.scale * LOG2E),
        keep(c, K) {}

  void run() {
    const int64_t parts = up(c.queries, Q * QUERY_TILES) / (Q * QUERY_TILES);
    at::parallel_for(0, c.batch * c.heads * parts, 1, [&](int64_t from, int64_t to) {
      Workspace w(*this);
      Mode::begin();
      for (int64_t n = from; n < to; ++n) rows(n / parts, n % parts * Q * QUERY_TILES, w);
      Mode::end();
    });
  }

 private:
  struct Workspace {
    explicit Workspace(const Forward& f)
        : scores(Q * std::max(f.width, K)),
          q(QUERY_TILES * Q * Mode::pieces * f.width),
          p(QUERY_TILES * KEY_TILES * Q * Mode::pieces * K),
          out(QUERY_TILES * Q * f.value_width),
          sums(QUERY_TILES * Q * 16),
          base(QUERY_TILES * Q),
          tile(K * std::max(f.width, f.value_width)),
          turned(K * f.width),
          keys(f.keep.blocks * Mode::pieces * f.width * K),
          values(f.keep.blocks * Mode::pieces * K * f.value_width),
          norms(f.keep.blocks * K),
          greatest(f.keep.blocks),
          query_norms(QUERY_TILES * Q) {}
    Buffer<float> scores;
    Buffer<Element> q, p;
    Buffer<float> out, sums, base, tile, turned;
    Buffer<Element> keys, values;  // right operands of a head: (D, K) and (K, Dv) a block
    Buffer<float> norms, greatest;  // of the keys, and of each block of them: negative where it is not there yet
    Buffer<float> query_norms;
    int64_t head = -1;             // whose keys these are
  };

  void pack(int64_t b, int64_t g, int64_t n, Workspace& w) {
    const int64_t rows = std::min(K, c.keys - n * K);
    float* tile = w.tile.data;
    take(tile, K, width, at_row<In>(c.k, b, g, n * K), c.k.row, rows, c.width);
    norms(tile, K, width, w.norms.data + n * K);
    w.greatest[n] = *std::max_element(w.norms.data + n * K, w.norms.data + (n + 1) * K);
    transpose(w.turned.data, tile, K, width);
    as_right<Mode>(w.keys.data + n * Mode::pieces * width * K, w.turned.data, width, K);
    take(tile, K, value_width, at_row<In>(c.v, b, g, n * K), c.v.row, rows, c.value_width);
    as_right<Mode>(w.values.data + n * Mode::pieces * K * value_width, tile, K, value_width);
  }

  // The blocks of keys that `count` queries from r0 read: [first, last).
  std::pair<int64_t, int64_t> reach(int64_t r0, int64_t count) const {
    const int64_t start = std::max<int64_t>(0, r0 + offset - c.left);
    const int64_t stop = std::min(c.keys, r0 + count + offset + c.right);
    return stop > start ? std::pair(start / K, (stop - 1) / K + 1) : std::pair<int64_t, int64_t>(0, 0);
  }

  void rows(int64_t head, int64_t r0, Workspace& w) {
    const int64_t b = head / c.heads, h = head % c.heads, g = h / (c.heads / c.groups);
    const int64_t all = std::min(Q * QUERY_TILES, c.queries - r0), tiles = up(all, Q) / Q;
    const auto count = [&](int64_t t) { return std::min(Q, all - t * Q); };
    for (int64_t t = 0; t < tiles; ++t) {
      take(w.scores.data, Q, width, at_row<In>(c.q, b, h, r0 + t * Q), c.q.row, count(t), c.width);
      norms(w.scores.data, Q, width, w.query_norms.data + t * Q);
      as_left<Mode>(w.q.data + t * Q * Mode::pieces * width, w.scores.data, Q, width);
    }
    std::fill_n(w.sums.data, tiles * Q * 16, 0.0f);
    std::fill_n(w.out.data, tiles * Q * value_width, 0.0f);
    const auto [start, stop] = reach(r0, all);
    if (w.head != b * c.groups + g) {
      w.head = b * c.groups + g;
      std::fill_n(w.greatest.data, keep.blocks, -1.0f);
    }
    for (int64_t n = start; n < stop; ++n)
      if (w.greatest[n] < 0.0f) pack(b, g, n, w);
    bool safe = true;
    for (int64_t t = 0; t < tiles; ++t) safe = bases(w, b, t, r0 + t * Q, count(t)) && safe;
    const int64_t step = safe ? KEY_TILES : 1;  // a base that grows must find all earlier weights summed
    for (int64_t n0 = start; n0 < stop; n0 += step)
      for (int pass = 0; pass < 2; ++pass)
        for (int64_t t = 0; t < tiles; ++t) {
          const auto [from, to] = reach(r0 + t * Q, count(t));
          for (int64_t n = std::max(n0, from); n < std::min(n0 + step, to); ++n) {
            if (keep.state[b * keep.blocks + n] == 0) continue;
            Element* p = w.p.data + (t * KEY_TILES + n - n0) * Q * Mode::pieces * K;
            if (pass == 0)
              scores(w, b, n, t, r0 + t * Q, count(t), p);
            else
              Mode::multiply(
                  Q, value_width, K, p, w.values.data + n * Mode::pieces * K * value_width,
                  w.out.data + t * Q * value_width, true);
          }
        }
    for (int64_t r = 0; r < all; ++r) {
      const float sum = _mm512_reduce_add_ps(_mm512_load_ps(w.sums.data + r * 16));
      c.lse[head * c.queries + r0 + r] = sum == 0.0f ? INF : w.base[r] * LN2 + std::log(sum);
      give(
          at_row<In>(c.out, b, h, r0 + r), 0, w.out.data + r * value_width, value_width, 1, c.value_width,
          sum == 0.0f ? 0.0f : 1.0f / sum);
    }
  }

  bool masked(int64_t b, int64_t n, int64_t r0, int64_t count) const {
    return keep.state[b * keep.blocks + n] == 1 || (n + 1) * K - 1 > r0 + offset + c.right ||
        n * K < r0 + count - 1 + offset - c.left;
  }

  // The lanes of the sixteen keys from column i of block n that a query at `row` reads.
  __mmask16 lanes(int64_t b, int64_t n, int64_t row, int64_t i) const {
    const int64_t position = row + offset - n * K;
    return keep.bits[(b * keep.blocks + n) * keep.words + i / 16] &
        between(position - c.left, position + c.right + 1, i);
  }

  // The first base of each row: 0, where it may stay that, or -inf. Whether all may.
  bool bases(Workspace& w, int64_t b, int64_t t, int64_t r0, int64_t count) const {
    alignas(64) float longest[Q];  // of the keys that a row reads
    float common = 0.0f;
    std::fill_n(longest, Q, 0.0f);
    const auto [from, to] = reach(r0, count);
    for (int64_t n = from; n < to; ++n) {
      if (keep.state[b * keep.blocks + n] == 0) continue;
      if (!masked(b, n, r0, count)) {
        common = std::max(common, w.greatest[n]);
        continue;
      }
      for (int64_t r = 0; r < count; ++r) {
        __m512 most = _mm512_setzero_ps();
        for (int64_t i = 0; i < K; i += 16)
          most = _mm512_max_ps(most, _mm512_maskz_load_ps(lanes(b, n, r0 + r, i), w.norms.data + n * K + i));
        longest[r] = std::max(longest[r], _mm512_reduce_max_ps(most));
      }
    }
    bool all = true;
    for (int64_t r = 0; r < count; ++r) {
      const bool safe = w.query_norms[t * Q + r] * std::max(longest[r], common) * std::abs(factor) <= SAFE;
      w.base[t * Q + r] = safe ? 0.0f : -INF;
      all = all && safe;
    }
    return all;
  }

  void scores(Workspace& w, int64_t b, int64_t n, int64_t t, int64_t r0, int64_t count, Element* p) {
    Mode::multiply(
        Q, K, width, w.q.data + t * Q * Mode::pieces * width, w.keys.data + n * Mode::pieces * width * K,
        w.scores.data, false);
    masked(b, n, r0, count) ? weights<true>(w, b, n, t, r0, count, p) : weights<false>(w, b, n, t, r0, count, p);
  }

  // Scores to weights, row by row. A base of 0 stays; else a row whose maximum grows has what it has summed so far
  // brought to the new base.
  template <bool masked>
  void weights(Workspace& w, int64_t b, int64_t n, int64_t t, int64_t r0, int64_t count, Element* weights) const {
    float* const sums = w.sums.data + t * Q * 16;
    float* const bases = w.base.data + t * Q;
    const __m512 scale = _mm512_set1_ps(factor);
    for (int64_t r = 0; r < count; ++r) {
      const float* s = w.scores.data + r * K;
      __mmask16 read[K / 16];
      if constexpr (masked)
        for (int64_t i = 0; i < K; i += 16) read[i / 16] = lanes(b, n, r0 + r, i);
      if (bases[r] != 0.0f) {
        __m512 most = _mm512_set1_ps(-INF);
        for (int64_t i = 0; i < K; i += 16) {
          const __m512 x = _mm512_mul_ps(_mm512_load_ps(s + i), scale);
          if constexpr (masked)
            most = _mm512_mask_max_ps(most, read[i / 16], most, x);
          else
            most = _mm512_max_ps(most, x);
        }
        raise(_mm512_reduce_max_ps(most), bases[r], sums + r * 16, w.out.data + (t * Q + r) * value_width);
      }
      const __m512 shift = _mm512_set1_ps(bases[r] == -INF ? 0.0f : bases[r]);
      __m512 sum = _mm512_load_ps(sums + r * 16);
      Element* p = weights + r * Mode::pieces * K;
      for (int64_t i = 0; i < K; i += 32) {
        __m512 x = exp2<Mode::degree>(_mm512_fmsub_ps(_mm512_load_ps(s + i), scale, shift));
        __m512 y = exp2<Mode::degree>(_mm512_fmsub_ps(_mm512_load_ps(s + i + 16), scale, shift));
        if constexpr (masked) {
          x = _mm512_maskz_mov_ps(read[i / 16], x);
          y = _mm512_maskz_mov_ps(read[i / 16 + 1], y);
        }
        sum = _mm512_add_ps(sum, Mode::row(p + i, K, x, y));
      }
      _mm512_store_ps(sums + r * 16, sum);
    }
  }

  void raise(float top, float& base, float* sums, float* out) const {
    if (!(top > base)) return;
    if (top == 0.0f) top = std::numeric_limits<float>::min();  // 0 is a base that stays
    if (base != -INF) {
      const __m512 shrink = _mm512_set1_ps(std::exp2(base - top));
      _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), shrink));
      for (int64_t i = 0; i < value_width; i += 16)
        _mm512_store_ps(out + i, _mm512_mul_ps(_mm512_load_ps(out + i), shrink));
    }
    base = top;
  }

  const Call& c;
  const int64_t width, value_width, offset;
  const float factor;
  const Keep keep;
};

// ---- backward ----

template <class Mode>
struct Backward {
  using Element = typename Mode::Element;
  using In = typename Mode::In;
  static constexpr int64_t Q = 128, K = 64, TILES = Mode::backward_tiles;

  explicit Backward(const Call& call)
      : c(call),
        width(up(c.width, 32)),
        value_width(up(c.value_width, 32)),
        offset(c.keys - c.queries),
        shared(c.heads / c.groups),
        factor(c.scale * LOG2E),
        keep(c, K),
        dk(shared > 1 ? c.batch * c.heads * c.keys * c.width : 0),
        dv(shared > 1 ? c.batch * c.heads * c.keys * c.value_width : 0) {}

  // One head is the work of one thread from end to end, so that every sum has one order however many threads there are.
  void run() {
    at::parallel_for(0, c.batch * c.heads, 1, [&](int64_t from, int64_t to) {
      Workspace w(*this);
      Mode::begin();
      for (int64_t head = from; head < to; ++head) run(head, w);
      Mode::end();
    });
    if (shared > 1)
      at::parallel_for(0, c.batch * c.groups, 1, [&](int64_t from, int64_t to) {
        for (int64_t n = from; n < to; ++n) {
          sum_heads(n, dk.data, c.width, c.dk);
          sum_heads(n, dv.data, c.value_width, c.dv);
        }
      });
  }

 private:
  struct Workspace {
    explicit Workspace(const Backward& f)
        : tile(std::max(Q, K) * std::max(f.width, f.value_width)),
          turned(std::max(Q, K) * std::max(f.width, f.value_width)),
          keys(f.keep.blocks * K * Mode::pieces * f.width),
          keys_t(f.keep.blocks * f.width * Mode::pieces * K),
          values(f.keep.blocks * K * Mode::pieces * f.value_width),
          queries_t(TILES * Mode::pieces * f.width * Q),
          queries(TILES * Mode::pieces * Q * f.width),
          douts_t(TILES * Mode::pieces * f.value_width * Q),
          douts(TILES * Mode::pieces * Q * f.value_width),
          p(TILES * K * Mode::pieces * Q),
          ds(TILES * K * Mode::pieces * Q),
          ds_right(TILES * K * Mode::pieces * Q),
          scores(K * Q),
          dp(K * Q),
          dk(f.keep.blocks * K * f.width),
          dv(f.keep.blocks * K * f.value_width),
          dq(TILES * f.width * Q),
          lse(TILES * Q),
          delta(TILES * Q) {}
    Buffer<float> tile, turned;
    Buffer<Element> keys, keys_t, values;                // left operands, of a head
    Buffer<Element> queries_t, queries, douts_t, douts;  // right operands, of TILES tiles of queries
    Buffer<Element> p, ds, ds_right;                     // two left operands and a right one, of as many
    Buffer<float> scores, dp, dk, dv, dq, lse, delta;
  };

  void run(int64_t head, Workspace& w) {
    const int64_t b = head / c.heads, h = head % c.heads, g = h / shared;
    for (int64_t n = 0; n < keep.blocks; ++n) pack_keys(b, g, n, w);
    std::fill_n(w.dk.data, keep.blocks * K * width, 0.0f);
    std::fill_n(w.dv.data, keep.blocks * K * value_width, 0.0f);
    for (int64_t r0 = 0; r0 < c.queries; r0 += TILES * Q) {
      const int64_t all = std::min(TILES * Q, c.queries - r0), tiles = up(all, Q) / Q;
      for (int64_t t = 0; t < tiles; ++t) pack_queries(b, h, r0 + t * Q, t, w);
      std::fill_n(w.dq.data, tiles * width * Q, 0.0f);
      const int64_t start = std::max<int64_t>(0, r0 + offset - c.left);
      const int64_t stop = std::min(c.keys, r0 + all + offset + c.right);
      for (int64_t n = start / K; n * K < stop; ++n)
        if (keep.state[b * keep.blocks + n] != 0) columns(b, n, r0, all, w);
      for (int64_t t = 0; t < tiles; ++t) {
        transpose(w.tile.data, w.dq.data + t * width * Q, width, Q);
        give(
            at_row<In>(c.dq, b, h, r0 + t * Q), c.dq.row, w.tile.data, width, std::min(Q, all - t * Q), c.width,
            c.scale);
      }
    }
    if (shared > 1) {
      const int64_t row = head * c.keys;
      give(dk.data + row * c.width, c.width, w.dk.data, width, c.keys, c.width, c.scale);
      give(dv.data + row * c.value_width, c.value_width, w.dv.data, value_width, c.keys, c.value_width, 1.0f);
    } else {
      give(at_row<In>(c.dk, b, g, 0), c.dk.row, w.dk.data, width, c.keys, c.width, c.scale);
      give(at_row<In>(c.dv, b, g, 0), c.dv.row, w.dv.data, value_width, c.keys, c.value_width, 1.0f);
    }
  }

  void pack_keys(int64_t b, int64_t g, int64_t n, Workspace& w) {
    const int64_t count = std::min(K, c.keys - n * K);
    take(w.tile.data, K, width, at_row<In>(c.k, b, g, n * K), c.k.row, count, c.width);
    as_left<Mode>(w.keys.data + n * K * Mode::pieces * width, w.tile.data, K, width);
    transpose(w.turned.data, w.tile.data, K, width);
    as_left<Mode>(w.keys_t.data + n * K * Mode::pieces * width, w.turned.data, width, K);
    take(w.tile.data, K, value_width, at_row<In>(c.v, b, g, n * K), c.v.row, count, c.value_width);
    as_left<Mode>(w.values.data + n * K * Mode::pieces * value_width, w.tile.data, K, value_width);
  }

  void pack_queries(int64_t b, int64_t h, int64_t r0, int64_t t, Workspace& w) {
    const int64_t count = std::min(Q, c.queries - r0);
    const int64_t size = Mode::pieces * Q * width, value_size = Mode::pieces * Q * value_width;
    take(w.tile.data, Q, width, at_row<In>(c.q, b, h, r0), c.q.row, count, c.width);
    as_right<Mode>(w.queries.data + t * size, w.tile.data, Q, width);
    transpose(w.turned.data, w.tile.data, Q, width);
    as_right<Mode>(w.queries_t.data + t * size, w.turned.data, width, Q);
    take(w.tile.data, Q, value_width, at_row<In>(c.dout, b, h, r0), c.dout.row, count, c.value_width);
    as_right<Mode>(w.douts.data + t * value_size, w.tile.data, Q, value_width);
    transpose(w.turned.data, w.tile.data, Q, value_width);
    as_right<Mode>(w.douts_t.data + t * value_size, w.turned.data, value_width, Q);
    const In* out = at_row<In>(c.out, b, h, r0);
    for (int64_t r = 0; r < Q; ++r) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; r < count && i < c.value_width; i += 16)
        sum = _mm512_fmadd_ps(
            load(out + r * c.out.row + i, first(c.value_width - i)), _mm512_load_ps(w.tile.data + r * value_width + i),
            sum);
      w.delta[t * Q + r] = _mm512_reduce_add_ps(sum);
      w.lse[t * Q + r] = r < count ? c.lse[(b * c.heads + h) * c.queries + r0 + r] * LOG2E : INF;
    }
  }

  // What block n of the keys and the `all` queries from r0 have to do with each other.
  void columns(int64_t b, int64_t n, int64_t r0, int64_t all, Workspace& w) {
    const int64_t c0 = n * K, count = std::min(K, c.keys - c0);
    const int64_t start = std::max<int64_t>(0, c0 - c.right - offset - r0);
    const int64_t stop = std::min(all, c0 + count + c.left - offset - r0);
    if (start >= stop) return;
    const int64_t from = start / Q, to = (stop - 1) / Q + 1;
    const int64_t size = Mode::pieces * Q * width, value_size = Mode::pieces * Q * value_width;
    const int64_t square = K * Mode::pieces * Q;
    const Element* keys = w.keys.data + n * K * Mode::pieces * width;
    const Element* keys_t = w.keys_t.data + n * K * Mode::pieces * width;
    const Element* values = w.values.data + n * K * Mode::pieces * value_width;
    const __mmask16* bits = keep.bits.data + (b * keep.blocks + n) * keep.words;
    for (int64_t t = from; t < to; ++t) {
      const int64_t row = r0 + t * Q, last = r0 + std::min((t + 1) * Q, all) - 1;
      const bool masked = keep.state[b * keep.blocks + n] == 1 || c0 + K - 1 > row + offset + c.right ||
          c0 < last + offset - c.left;
      Mode::multiply(K, Q, width, keys, w.queries_t.data + t * size, w.scores.data, false);
      Mode::multiply(K, Q, value_width, values, w.douts_t.data + t * value_size, w.dp.data, false);
      masked ? gradients<true>(w, t, square, row, c0, bits) : gradients<false>(w, t, square, row, c0, bits);
    }
    for (int64_t t = from; t < to; ++t)
      Mode::multiply(
          K, value_width, Q, w.p.data + t * square, w.douts.data + t * value_size, w.dv.data + c0 * value_width, true);
    for (int64_t t = from; t < to; ++t)
      Mode::multiply(K, width, Q, w.ds.data + t * square, w.queries.data + t * size, w.dk.data + c0 * width, true);
    for (int64_t t = from; t < to; ++t)
      Mode::multiply(width, Q, K, keys_t, w.ds_right.data + t * square, w.dq.data + t * width * Q, true);
  }

  // Pᵀ and dSᵀ = Pᵀ (dPᵀ - delta), two keys at a time, as dSᵀ is both a left and a right operand.
  template <bool masked>
  void gradients(Workspace& w, int64_t t, int64_t square, int64_t r0, int64_t c0, const __mmask16* bits) {
    const __m512 scale = _mm512_set1_ps(factor);
    for (int64_t j = 0; j < K; j += 2)
      for (int64_t i = 0; i < Q; i += 32) {
        __m512 ds[2][2];
        for (int64_t row = 0; row < 2; ++row) {
          const int64_t key = c0 + j + row - offset - r0, lo = key - c.right, hi = key + c.left + 1;
          const bool kept = !masked || (bits[(j + row) / 16] >> (j + row) % 16 & 1);
          __m512 p[2];
          for (int64_t half = 0; half < 2; ++half) {
            const int64_t at = i + 16 * half;
            const __m512 lse = _mm512_load_ps(w.lse.data + t * Q + at), delta = _mm512_load_ps(w.delta.data + t * Q + at);
            const __m512 s = _mm512_load_ps(w.scores.data + (j + row) * Q + at);
            const __m512 dp = _mm512_load_ps(w.dp.data + (j + row) * Q + at);
            p[half] = exp2<Mode::degree>(_mm512_fmsub_ps(s, scale, lse));
            if constexpr (masked)
              p[half] = _mm512_maskz_mov_ps(kept ? between(lo, hi, at) : static_cast<__mmask16>(0), p[half]);
            ds[row][half] = _mm512_mul_ps(p[half], _mm512_sub_ps(dp, delta));
          }
          const int64_t to = t * square + (j + row) * Mode::pieces * Q + i;
          Mode::row(w.p.data + to, Q, p[0], p[1]);
          Mode::row(w.ds.data + to, Q, ds[row][0], ds[row][1]);
        }
        Mode::pair(w.ds_right.data + t * square, j, i, K, Q, ds[0][0], ds[1][0]);
        Mode::pair(w.ds_right.data + t * square, j, i + 16, K, Q, ds[0][1], ds[1][1]);
      }
  }

  void sum_heads(int64_t n, const float* parts, int64_t size, const Tensor4& to) {
    const int64_t b = n / c.groups, g = n % c.groups;
    for (int64_t r = 0; r < c.keys; ++r)
      for (int64_t i = 0; i < size; i += 16) {
        const __mmask16 lanes = first(size - i);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t h = g * shared; h < (g + 1) * shared; ++h)
          sum = _mm512_add_ps(sum, load(parts + ((b * c.heads + h) * c.keys + r) * size + i, lanes));
        store(at_row<In>(to, b, g, r) + i, sum, lanes);
      }
  }

  const Call& c;
  const int64_t width, value_width, offset, shared;
  const float factor;
  const Keep keep;
  Buffer<float> dk, dv;  // a part for each of the query heads that share a key head
};

template <template <class> class Direction>
const char* dispatch(const Call& call) {
  static thread_local std::string message;
  try {
#ifdef __AVX512BF16__
    if (call.bfloat16) {
      Direction<Half>(call).run();
      return nullptr;
    }
#endif
#ifdef __AMX_BF16__
    if (could_pack(at::kBFloat16)) {  // whether oneDNN may use the tile unit, for which it asks the system
      Direction<Split>(call).run();
      return nullptr;
    }
#endif
    Direction<Plain>(call).run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* core_attn_forward(const Call* call) { return dispatch<Forward>(*call); }
extern "C" const char* core_attn_backward(const Call* call) { return dispatch<Backward>(*call); }
