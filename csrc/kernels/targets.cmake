# The kernels as object libraries, for the extension (CMakeLists.txt) and for programs without torch
# (tests/gpu/CMakeLists.txt). Sets KERNEL_LIBRARIES, and KERNEL_DEFINITIONS for those that call them.
# CMAKE_CUDA_ARCHITECTURES says what for; LORA_EXT_ANY_GPU_ARCHITECTURES the same for the kernels
# that older GPUs run too. KERNEL_OBJECTS is empty, or the folder of another build of the same
# sources and architectures, whose objects programs take instead of compiling them again.
set(KERNELS ${CMAKE_CURRENT_LIST_DIR})
set(KERNEL_LIBRARIES "")
set(KERNEL_DEFINITIONS "")

function(add_cuda_kernels name)
  add_library(${name} OBJECT EXCLUDE_FROM_ALL ${ARGN})
  target_include_directories(${name} PRIVATE ${KERNELS}/..)
  set_target_properties(${name} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON
                                           CUDA_VISIBILITY_PRESET hidden)
  # Of a small kernel reading headers is most of the work (from CMake 3.31 on).
  set_target_properties(${name} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 4)
  target_compile_options(${name} PRIVATE -O3)
  set(KERNEL_LIBRARIES ${KERNEL_LIBRARIES} ${name} PARENT_SCOPE)
endfunction()
# The same source once for each type of the base, so that both are compiled at the same time.
function(add_cuda_kernels_by_base name)
  foreach(base Bf16 Fp16)
    add_cuda_kernels(${name}_${base} ${ARGN})
    target_compile_definitions(${name}_${base} PRIVATE LORA_EXT_BASE=${base})
  endforeach()
  set(KERNEL_LIBRARIES ${KERNEL_LIBRARIES} PARENT_SCOPE)
endfunction()

# Those that need mma.sync and cp.async: setup.py leaves out targets before sm_80.
add_cuda_kernels_by_base(cuda_kernels ${KERNELS}/lora_linear_multi_run.cu
                         ${KERNELS}/lora_linear_grouped_run.cu ${KERNELS}/lora_linear_run.cu
                         ${KERNELS}/low_rank_sm80.cu ${KERNELS}/product_sm80.cu)
# Dropout's masks, merging, DoRA, embeddings and quantized matrices, which a GPU without the others
# needs as well.
add_cuda_kernels(cuda_kernels_any_gpu ${KERNELS}/column_scale.cu ${KERNELS}/dequantize.cu
                 ${KERNELS}/dropout.cu ${KERNELS}/lora_embedding.cu ${KERNELS}/merge.cu
                 ${KERNELS}/sum_parts.cu ${KERNELS}/weight_norm.cu ${KERNELS}/write_table.cu)
set_target_properties(cuda_kernels_any_gpu PROPERTIES
  CUDA_ARCHITECTURES "${LORA_EXT_ANY_GPU_ARCHITECTURES}")
# TMA and wgmma are instructions of sm_90a alone, whatever else the build is for.
if("${CMAKE_CUDA_ARCHITECTURES}" MATCHES "90a")
  add_cuda_kernels_by_base(cuda_kernels_sm90 ${KERNELS}/low_rank_sm90.cu ${KERNELS}/product_sm90.cu)
  set_target_properties(cuda_kernels_sm90_Bf16 cuda_kernels_sm90_Fp16 PROPERTIES
    CUDA_ARCHITECTURES 90a-real)
  set(KERNEL_DEFINITIONS LORA_EXT_SM90)
endif()
foreach(library ${KERNEL_LIBRARIES})
  target_compile_definitions(${library} PRIVATE ${KERNEL_DEFINITIONS})
endforeach()

# A program that calls them: add_gpu_program(name [EXCLUDE_FROM_ALL] sources...)
function(add_gpu_program name)
  add_executable(${name} ${ARGN})
  if(KERNEL_OBJECTS)
    file(GLOB_RECURSE objects "${KERNEL_OBJECTS}/CMakeFiles/*.cu.o")
    list(FILTER objects INCLUDE REGEX "/cuda_kernels_[^/]*/")
    if(NOT objects)
      message(FATAL_ERROR "KERNEL_OBJECTS: got '${KERNEL_OBJECTS}', which has none, expected the folder "
                          "of a build of the extension with CUDA")
    endif()
    target_sources(${name} PRIVATE ${objects})
  else()
    foreach(library ${KERNEL_LIBRARIES})
      target_sources(${name} PRIVATE $<TARGET_OBJECTS:${library}>)
    endforeach()
  endif()
  target_include_directories(${name} PRIVATE ${KERNELS}/..)
  target_compile_definitions(${name} PRIVATE ${KERNEL_DEFINITIONS})
  target_compile_options(${name} PRIVATE -O3 -lineinfo)
  set_target_properties(${name} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
endfunction()
