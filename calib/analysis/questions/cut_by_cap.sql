-- Where the cap on detections per image cuts true detections, per bin of training instances.
-- views: matches, results
-- options: bins, cap
--
-- A true detection is cut if `cap` (300) or more detections of its image score higher. Only what the detections file
-- holds can be counted: score with a higher --max-detections than the cap. median_rank is that of true detections.
WITH binned AS (
    SELECT
        m.run,
        m.rank,
        CASE WHEN r.instance_count IS NOT NULL THEN 1 + len(list_filter(
            string_split(coalesce(getvariable('bins'), '10,100,1000'), ',')::BIGINT[],
            lambda edge: r.instance_count >= edge
        )) END AS bin
    FROM matches AS m
    JOIN results AS r ON r.run = m.run AND r.category_id = m.category_id
    WHERE m.kind = 'true'
)
SELECT
    run,
    bin,
    count(*) AS n_true,
    count(*) FILTER (rank > coalesce(getvariable('cap')::BIGINT, 300)) AS n_cut,
    count(*) FILTER (rank > coalesce(getvariable('cap')::BIGINT, 300)) / count(*) AS share_cut,
    quantile_cont(rank, 0.5) AS median_rank,
    quantile_cont(rank, 0.9) AS p90_rank
FROM binned
GROUP BY run, bin
ORDER BY run, bin;
