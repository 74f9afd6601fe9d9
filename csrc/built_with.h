// What a library was built with, as text in its file, where `softmask-fast doctor` reads it without loading it.
#pragma once

#include <torch/headeronly/version.h>

#define SOFTMASK_TEXT_(token) #token
#define SOFTMASK_TEXT(token) SOFTMASK_TEXT_(token)
#ifdef __clang__
#define SOFTMASK_COMPILER __VERSION__
#else
#define SOFTMASK_COMPILER "GCC " __VERSION__
#endif
#ifdef __CUDACC__
#define SOFTMASK_NVCC "nvcc " SOFTMASK_TEXT(__CUDACC_VER_MAJOR__) "." SOFTMASK_TEXT(__CUDACC_VER_MINOR__) ", "
#else
#define SOFTMASK_NVCC ""
#endif

__attribute__((used)) static const char softmask_built_with[] =
    "softmask_fast, built with " SOFTMASK_NVCC SOFTMASK_COMPILER ", torch " TORCH_VERSION;
