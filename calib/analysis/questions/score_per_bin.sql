-- Distribution of scores per bin of training instances: true detections against false ones.
-- views: matches, results
-- options: bins, cap
--
-- Quantiles of the scores of judged detections among the best `cap` (300) of their image.
WITH binned AS (
    SELECT
        m.run,
        m.score,
        m.kind = 'true' AS is_true,
        CASE WHEN r.instance_count IS NOT NULL THEN 1 + len(list_filter(
            string_split(coalesce(getvariable('bins'), '10,100,1000'), ',')::BIGINT[],
            lambda edge: r.instance_count >= edge
        )) END AS bin
    FROM matches AS m
    JOIN results AS r ON r.run = m.run AND r.category_id = m.category_id
    WHERE m.kind NOT IN ('unjudged', 'ignored') AND m.rank <= coalesce(getvariable('cap')::BIGINT, 300)
)
SELECT
    run,
    bin,
    is_true,
    count(*) AS n,
    quantile_cont(score, 0.1) AS p10,
    quantile_cont(score, 0.5) AS median,
    quantile_cont(score, 0.9) AS p90,
    max(score) AS most
FROM binned
GROUP BY run, bin, is_true
ORDER BY run, bin, is_true DESC;
