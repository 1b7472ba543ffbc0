// Umbrella header of the public C++ API.
#pragma once
#include <probquant/cuda.h>
#include <probquant/info.h>
#include <probquant/ops.h>
#include <probquant/types.h>
