"""mode="ar": the context tower chooses token by token. Source: system.md section 4, 'AR'."""

from twotower.engine.batch import DecodingMode
from twotower.engine.verify import newest_alone, start, verify

AR = DecodingMode(choose=verify, draft=newest_alone, start=start, num_unread=1)
