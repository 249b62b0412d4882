# Scripts in examples/ find the package examples.common as `common`; type checkers find it here.
from examples.common import atomic_file as atomic_file
from examples.common import data as data
from examples.common import frozen_features as frozen_features
from examples.common import kept_features as kept_features
from examples.common import learning_rate as learning_rate
from examples.common import metrics as metrics
from examples.common import models as models
from examples.common import options as options
from examples.common import pretrained as pretrained
from examples.common import run_folder as run_folder
from examples.common import runs as runs
from examples.common import two_views as two_views
from examples.common import weights as weights
