// Tiles by element size and padded width: the only place where tile literals live. All fit 99 KiB
// of shared memory (sm_86, sm_89, sm_120) unless said. No row was measured on hardware.
#pragma once

namespace fmm::cuda {

// A block of kRows rows walks tiles of kCols columns: kWarps warps, each 16 * kMT rows and one of
// kSplit parts of the width.
template <int kRows_, int kCols_, int kWarps_, int kSplit_, int kStages_>
struct Shape {
  static constexpr int kRows = kRows_, kCols = kCols_, kWarps = kWarps_, kSplit = kSplit_;
  static constexpr int kStages = kStages_, kThreads = 32 * kWarps;
  static constexpr int kMT = kRows * kSplit / (16 * kWarps);
  static_assert(kMT * 16 * kWarps == kRows * kSplit && kMT > 0);
  static constexpr int kNT = kCols / 8;
  static_assert(kNT * 8 == kCols && kNT % 2 == 0 && kNT <= 16);
};

template <int kBytes, int kWidth>
struct AttendFwd;  // one direction: q resident, k and v walked
template <>
struct AttendFwd<2, 32> : Shape<128, 64, 4, 1, 2> {};
template <>
struct AttendFwd<2, 64> : Shape<128, 64, 4, 1, 2> {};
template <>
struct AttendFwd<2, 128> : Shape<64, 64, 4, 1, 2> {};
template <>
struct AttendFwd<2, 256> : Shape<64, 32, 4, 1, 2> {};
template <>
struct AttendFwd<4, 32> : Shape<64, 32, 4, 1, 2> {};
template <>
struct AttendFwd<4, 64> : Shape<64, 32, 4, 1, 2> {};
template <>
struct AttendFwd<4, 128> : Shape<64, 16, 4, 1, 2> {};
template <>
struct AttendFwd<4, 256> : Shape<32, 16, 4, 2, 2> {};

template <int kBytes, int kWidth>
struct OwnerBwd;  // a block owns rows of one stream, up to three tiles of the other are walked
template <>
struct OwnerBwd<2, 32> : Shape<64, 64, 4, 1, 2> {};
template <>
struct OwnerBwd<2, 64> : Shape<64, 64, 4, 1, 2> {};
template <>
struct OwnerBwd<2, 128> : Shape<64, 32, 4, 1, 2> {};
template <>
struct OwnerBwd<2, 256> : Shape<32, 16, 4, 2, 2> {};
template <>
struct OwnerBwd<4, 32> : Shape<64, 32, 4, 1, 2> {};
template <>
struct OwnerBwd<4, 64> : Shape<64, 16, 4, 1, 2> {};
template <>
struct OwnerBwd<4, 128> : Shape<32, 16, 4, 2, 2> {};
template <>
struct OwnerBwd<4, 256> : Shape<16, 16, 4, 4, 1> {};

}  // namespace fmm::cuda
