# What type checkers see of the names that __init__.py loads lazily; a test holds the two together.
from switchmoe import config as config
from switchmoe import data as data
from switchmoe import dispatching as dispatching
from switchmoe import experts as experts
from switchmoe import layer as layer
from switchmoe import models as models
from switchmoe import nn as nn
from switchmoe import report as report
from switchmoe import routing as routing
from switchmoe import train as train
from switchmoe.config import MoEConfig as MoEConfig
from switchmoe.dispatching import SlotPlan as SlotPlan
from switchmoe.dispatching import assign_slots as assign_slots
from switchmoe.dispatching import capacity as capacity
from switchmoe.dispatching import combine as combine
from switchmoe.dispatching import dispatch as dispatch
from switchmoe.dispatching import expected_drop as expected_drop
from switchmoe.experts import ExpertParams as ExpertParams
from switchmoe.layer import MoEParams as MoEParams
from switchmoe.layer import init_moe as init_moe
from switchmoe.layer import moe as moe
from switchmoe.layer import moe_with_trace as moe_with_trace
from switchmoe.routing import ROUTERS as ROUTERS
from switchmoe.routing import MoEAux as MoEAux
from switchmoe.routing import Routing as Routing
from switchmoe.routing import add_aux as add_aux
from switchmoe.routing import aux_loss as aux_loss
from switchmoe.routing import route as route
from switchmoe.routing import summarize as summarize
from switchmoe.routing import update_bias as update_bias

__version__: str
