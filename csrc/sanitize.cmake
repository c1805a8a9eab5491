# Builds and runs the C++ tests under each sanitizer: cmake -P csrc/sanitize.cmake
foreach(sanitizer address,undefined thread)
  string(REPLACE "," "-" name ${sanitizer})
  set(build ${CMAKE_CURRENT_LIST_DIR}/../build/sanitize-${name})
  message(STATUS "sanitizer: ${sanitizer}")
  execute_process(
    COMMAND ${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR} -B ${build} -DSPT_PYTHON=OFF
            -DSPT_EMULATE_AVX512=ON -DSPT_SANITIZE=${sanitizer}
    COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${CMAKE_COMMAND} --build ${build} --parallel COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${build}/spt_native_test COMMAND_ERROR_IS_FATAL ANY)
endforeach()
