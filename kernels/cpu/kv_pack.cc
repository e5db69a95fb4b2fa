#include "kernels/kv_pack.h"
