#include "model/head_clusters.h"
