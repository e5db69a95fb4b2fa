#include "kernels/pattern.h"
