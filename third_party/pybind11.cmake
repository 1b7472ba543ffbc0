# Finds pybind11, and the Python that asks for it. Nothing is downloaded: the build requirements of pyproject.toml bring
# it along, and setup.py says where it lies (pybind11_DIR); for a plain CMake build, `pip install pybind11` and pass
# -Dpybind11_DIR=$(python -m pybind11 --cmakedir).
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 2.13 CONFIG REQUIRED)
