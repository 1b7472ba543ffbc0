# Owns the search for nvcc and the choice of architectures. Sets
#   CMAKE_CUDA_COMPILER       nvcc, if one is found that compiles; false otherwise
#   CMAKE_CUDA_ARCHITECTURES  those of PROBQUANT_CUDA_ARCHS that it knows
include(CheckLanguage)

find_program(
  PROBQUANT_NVCC nvcc
  HINTS ENV CUDA_HOME ENV CUDA_PATH
  PATHS /usr/local/cuda
  PATH_SUFFIXES bin)
mark_as_advanced(PROBQUANT_NVCC)
if(CMAKE_CUDA_COMPILER)
  set(nvcc "${CMAKE_CUDA_COMPILER}")
elseif(DEFINED ENV{CUDACXX})
  set(nvcc "$ENV{CUDACXX}")
else()
  set(nvcc "${PROBQUANT_NVCC}")
endif()

set(known)
if(nvcc)
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
endif()
set(CMAKE_CUDA_ARCHITECTURES)
foreach(arch IN LISTS PROBQUANT_CUDA_ARCHS)
  string(REGEX REPLACE "-(real|virtual)$" "" number "${arch}")
  if(known MATCHES "compute_${number}[^0-9]")
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch})
  endif()
endforeach()

if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # a failed search of an earlier run must not stick
endif()
if(CMAKE_CUDA_ARCHITECTURES)
  # The check runs in a CMake of its own, which hears only of the environment. Without architectures an older CMake
  # would try its default, which a newer nvcc may have dropped.
  set(ENV{CUDACXX} "${nvcc}")
  set(ENV{CUDAARCHS} "${CMAKE_CUDA_ARCHITECTURES}")
  check_language(CUDA)
endif()
