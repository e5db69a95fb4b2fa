#include "kernels/layer_ops.h"
