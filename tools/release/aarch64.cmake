# GCC 12 knows no SME: the two libraries of kernels for it are compiled without, and left out of the wheel.
cmake_language(DEFER CALL without_sme)

function(without_sme)
    foreach (target ggml-cpu-armv9.2_1 ggml-cpu-armv9.2_2)
        set_property(TARGET ${target} PROPERTY COMPILE_OPTIONS -march=armv8.2-a)
        get_property(definitions TARGET ${target} PROPERTY COMPILE_DEFINITIONS)
        list(REMOVE_ITEM definitions GGML_USE_SME)
        set_property(TARGET ${target} PROPERTY COMPILE_DEFINITIONS ${definitions})
    endforeach()
endfunction()
