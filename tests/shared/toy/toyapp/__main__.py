import sys

from toyapp.app import main

sys.exit(main())
