# What the files of one instruction set define for others are their install functions alone: the linker may take any definition of an inline function
# or a template for all files, and one that was compiled with their flags would end a program on a lesser processor.
#   cmake -DNM=nm "-DOBJECTS=a.o|b.o" -P isa_objects.cmake
string(REPLACE "|" ";" objects "${OBJECTS}")
list(FILTER objects INCLUDE REGEX "/cpu/(avx2|avx512vnni|amx)/[^/]*$")
set(installs 0)
foreach(object IN LISTS objects)
  execute_process(COMMAND ${NM} --defined-only --extern-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
  foreach(symbol IN LISTS symbols)
    if(symbol MATCHES " T _ZN9probquant[0-9]+install_")
      math(EXPR installs "${installs} + 1")
    elseif(NOT symbol MATCHES " V DW\\.ref\\.__gxx_personality_v0$") # a pointer, the same in all
      message(SEND_ERROR "${object} defines ${symbol}, want install functions alone")
    endif()
  endforeach()
endforeach()
list(LENGTH objects count)
if(count EQUAL 0 OR NOT installs EQUAL count)
  message(FATAL_ERROR "${count} files of instruction sets define ${installs} install functions, want one in each")
endif()
