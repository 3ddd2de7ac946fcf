// How kernels are launched, on the host.
#pragma once

#include "machine.cuh"

#ifndef GR_CUDA_EMULATED

namespace gr {

/* Makes a device the current one for as long as this lives. */
struct OnDevice {
  int before = -1;
  const char* why = nullptr;

  explicit OnDevice(int device) {
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) {
      error = cudaSetDevice(device);
    } else {
      before = -1;
    }
    if (error != cudaSuccess) why = cudaGetErrorString(error);
  }
  ~OnDevice() {
    if (before >= 0) cudaSetDevice(before);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
};

/* Null, or why it cannot be. An error that an earlier call left behind is not taken for its own. */
template <class P>
const char* launch(void (*kernel)(P), int x, int y, int threads, int shared_bytes, void* stream,
                   const P& parameters) {
  cudaError_t error = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
      shared_bytes);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<P*>(&parameters)};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(x, y), dim3(threads),
                             arguments, shared_bytes, static_cast<cudaStream_t>(stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gr

#endif
