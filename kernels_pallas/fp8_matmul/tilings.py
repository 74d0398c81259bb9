from kernels_pallas.fp8_matmul.persistent import Tiling
def forward(rows, columns, depth, grouped): return Tiling()
def weight_gradient(i,j,tokens): return Tiling()
