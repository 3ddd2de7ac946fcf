// What an instruction set offers to the exact search.
#pragma once

#include <stdint.h>

namespace gr {

constexpr int kTopkUsers = 6;    // that are scored together
constexpr int kTopkItems = 64;   // likewise: four groups of 16

struct TopkKernels {
  const char* name;
  // Scores of count users (at most kTopkUsers), (count, depth), with kTopkItems items, whose
  // vectors lie as [group of 16][depth][16], into scores (count, kTopkItems). A score is summed
  // from the first to the last product, whoever its mates are.
  void (*score)(const float* users, int count, int64_t depth, const float* items, float* scores);
  // One bit for each of kTopkItems scores above the threshold.
  uint64_t (*above)(const float* scores, float threshold);
};

extern const TopkKernels kTopkAvx512, kTopkAvx2;

}  // namespace gr
