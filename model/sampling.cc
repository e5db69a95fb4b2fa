#include "model/sampling.h"
