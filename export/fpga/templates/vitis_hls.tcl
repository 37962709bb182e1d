# A start for synthesis with Vitis HLS. Not tested: no vendor tool was at hand.
open_project -reset project
set_top $function
add_files model.cpp
add_files -tb testbench.cpp
add_files -tb golden
add_files -tb weights
open_solution -reset solution
set_part xczu9eg-ffvb1156-2-e
create_clock -period 3.33
csynth_design
export_design -format ip_catalog
exit
