// Tiles by element size and padded width: the only place where tile literals live. All fit 99 KiB
// of shared memory (sm_86, sm_89, sm_120) unless said. Those of attention in 16-bit types were
// chosen on an H100, all by mma.sync, unless said; the others on no hardware.
#pragma once

namespace fmm::cuda {

// A block of kRows rows walks tiles of kCols columns: kWarps warps, each kMT strips of 16 rows and
// one of kSplit parts of the width. A multiprocessor's registers are to suffice for kBlocks blocks.
template <int kRows_, int kCols_, int kWarps_, int kSplit_, int kStages_, int kBlocks_ = 1>
struct Shape {
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kRows = kRows_, kCols = kCols_, kWarps = kWarps_, kSplit = kSplit_;
  static constexpr int kStages = kStages_, kThreads = 32 * kWarps;
  static constexpr int kMT = kRows * kSplit / (16 * kWarps);
  static constexpr int kStrips = kWarps / kSplit;  // that warps have at once
  static constexpr int strip_of(int warp) { return kSplit == 1 ? warp : warp % kStrips; }
  static constexpr int part_of(int warp) { return kSplit == 1 ? 0 : warp / kStrips; }
  static_assert(kMT * 16 * kWarps == kRows * kSplit && kMT > 0);
  static constexpr int kNT = kCols / 8;
  static_assert(kNT * 8 == kCols && kNT % 2 == 0 && kNT <= 16);
};

struct PairTile : Shape<64, 64, 4, 1, 1> {};  // products of a loss, read from memory

template <int kWidth>
struct PairFwd;  // 16-bit types: x resident, y walked
template <>
struct PairFwd<32> : Shape<128, 64, 4, 1, 2> {};
template <>
struct PairFwd<64> : Shape<128, 64, 4, 1, 2> {};
template <>
struct PairFwd<128> : Shape<128, 64, 8, 1, 2> {};
template <>
struct PairFwd<256> : Shape<64, 64, 4, 1, 1> {};

template <int kWidth>
struct PairBwd;  // 16-bit types: a block owns rows of one stream and walks the other
template <>
struct PairBwd<32> : Shape<128, 64, 4, 1, 2> {};
template <>
struct PairBwd<64> : Shape<128, 64, 4, 1, 2> {};
template <>
struct PairBwd<128> : Shape<64, 64, 4, 1, 2> {};
template <>
struct PairBwd<256> : Shape<64, 32, 4, 1, 2> {};

// Tall tiles are for more rows than the others have, and devices that run eight of their warps at
// once.
template <int kBytes, int kWidth>
constexpr int kTallerFwd = kBytes == 2 ? (kWidth >= 64) + (kWidth == 256) : 0;  // how many
template <int kBytes, int kWidth>
constexpr int kTallerBwd = kBytes == 2 && kWidth == 256 ? 2 : 0;

template <int kBytes, int kWidth, int kHeight>
struct AttendFwd;  // one direction: q resident, k and v walked
template <>
struct AttendFwd<2, 32, 0> : Shape<64, 64, 4, 1, 2> {};
template <>
struct AttendFwd<2, 64, 0> : Shape<64, 64, 4, 1, 2, 3> {};
template <>
struct AttendFwd<2, 128, 0> : Shape<64, 64, 4, 1, 2> {};
template <>
struct AttendFwd<2, 256, 0> : Shape<64, 32, 4, 1, 2> {};
template <>
struct AttendFwd<4, 32, 0> : Shape<64, 32, 4, 1, 2> {};
template <>
struct AttendFwd<4, 64, 0> : Shape<64, 32, 4, 1, 2> {};
template <>
struct AttendFwd<4, 128, 0> : Shape<64, 16, 4, 1, 2> {};
template <>
struct AttendFwd<4, 256, 0> : Shape<32, 16, 4, 2, 2> {};
template <>
struct AttendFwd<2, 64, 1> : Shape<128, 64, 4, 1, 2> {};
template <>
struct AttendFwd<2, 128, 1> : Shape<128, 32, 4, 1, 2> {};
template <>
struct AttendFwd<2, 256, 1> : Shape<64, 64, 4, 1, 1> {};
template <>
struct AttendFwd<2, 256, 2> : Shape<128, 64, 8, 1, 2> {};  // 193 KiB, by bytes through the L2

template <int kBytes, int kWidth, int kHeight>
struct OwnerBwd;  // a block owns rows of one stream, up to three tiles of the other are walked
template <>
struct OwnerBwd<2, 32, 0> : Shape<64, 64, 4, 1, 2> {};
template <>
struct OwnerBwd<2, 64, 0> : Shape<64, 64, 4, 1, 2> {};
template <>
struct OwnerBwd<2, 128, 0> : Shape<64, 32, 4, 1, 2> {};
template <>
struct OwnerBwd<2, 256, 0> : Shape<32, 16, 4, 2, 2> {};
template <>
struct OwnerBwd<4, 32, 0> : Shape<64, 32, 4, 1, 2> {};
template <>
struct OwnerBwd<4, 64, 0> : Shape<64, 16, 4, 1, 2> {};
template <>
struct OwnerBwd<4, 128, 0> : Shape<32, 16, 4, 2, 2> {};
template <>
struct OwnerBwd<4, 256, 0> : Shape<16, 16, 4, 4, 1> {};
template <>
struct OwnerBwd<2, 256, 1> : Shape<64, 32, 8, 2, 1> {};  // 155 KiB, by counts
template <>
struct OwnerBwd<2, 256, 2> : Shape<64, 32, 8, 2, 2> {};  // 204 KiB

// The short stream of up to kCols_ tokens stays resident, the long one passes in tiles of kRows.
// Its results, [kCols, width], are spread over the warps: kGroups of 16 * kMC rows, and columns.
// kChunk columns of a row result are computed at once.
template <int kWidth, int kRows_, int kCols_, int kWarps_, int kStages_, int kChunk_ = 32,
          int kBlocks_ = 1>
struct ResidentShape : Shape<kRows_, kCols_, kWarps_, 1, kStages_, kBlocks_> {
  static constexpr int kGroups = kCols_ / 16 < kWarps_ ? kCols_ / 16 : kWarps_;
  static constexpr int kMC = kCols_ / 16 / kGroups, kDC = kWidth / 8 * kGroups / kWarps_;
  static_assert(kMC * kGroups * 16 == kCols_ && kDC * 8 * kWarps_ == kWidth * kGroups);
  static constexpr int kChunk = kChunk_;
};

template <int kWidth, int kCols>
struct ResidentFwd;  // 16-bit types; short streams of up to kCols tokens
template <>
struct ResidentFwd<32, 64> : ResidentShape<32, 64, 64, 4, 2, 32, 3> {};
template <>
struct ResidentFwd<32, 128> : ResidentShape<32, 128, 128, 8, 2, 16> {};
template <>
struct ResidentFwd<64, 32> : ResidentShape<64, 32, 32, 2, 2, 32, 6> {};  // by counts
template <>
struct ResidentFwd<64, 64> : ResidentShape<64, 64, 64, 4, 2, 64> {};
template <>
struct ResidentFwd<64, 128> : ResidentShape<64, 128, 128, 8, 2, 16> {};  // 137 KiB
template <>
struct ResidentFwd<128, 32> : ResidentShape<128, 64, 32, 4, 1, 32, 3> {};  // by counts
template <>
struct ResidentFwd<128, 64> : ResidentShape<128, 64, 64, 4, 2> {};  // 107 KiB
template <>
struct ResidentFwd<256, 32> : ResidentShape<256, 64, 32, 4, 1> {};  // 102 KiB

template <int kWidth, int kRows>
struct ResidentBwd;  // 16-bit types; a block owns a short stream of up to kRows tokens; by counts
template <>
struct ResidentBwd<32, 64> : Shape<64, 64, 4, 1, 2> {};
template <>
struct ResidentBwd<32, 128> : Shape<128, 64, 8, 1, 2> {};
template <>
struct ResidentBwd<32, 256> : Shape<256, 64, 8, 1, 2> {};  // 147 KiB
template <>
struct ResidentBwd<64, 32> : Shape<32, 32, 2, 1, 2> {};
template <>
struct ResidentBwd<64, 64> : Shape<64, 64, 4, 1, 2> {};
template <>
struct ResidentBwd<64, 128> : Shape<128, 64, 8, 1, 2> {};  // 135 KiB
template <>
struct ResidentBwd<64, 256> : Shape<256, 32, 8, 1, 2> {};  // 162 KiB
template <>
struct ResidentBwd<128, 32> : Shape<32, 32, 2, 1, 2> {};
template <>
struct ResidentBwd<128, 64> : Shape<64, 32, 4, 1, 2> {};  // 108 KiB
template <>
struct ResidentBwd<128, 128> : Shape<128, 32, 8, 1, 1> {};  // 141 KiB

}  // namespace fmm::cuda
